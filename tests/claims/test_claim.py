"""Claims: how a check comes out, how a verdict is reached, and what a run measures."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fallline import InputError
from fallline.claims.claim import Check, Claim, Scale, Verdict, all_of, run


def claim(value=0.5, control=2.0, hypothesis=0.0, **options):
    """Measures `value`, and `control` in the control; the threshold is at most 1."""
    return Claim(
        **{
            "name": "one",
            "statement": "it is small",
            "refuted_by": "it is large",
            "kind": "bound",
            "source": "Theorem 1",
            "tolerance": "1",
            "seeds": dict.fromkeys(Scale, 3),
            "build": lambda scale: (scale, [Check("hypothesis", hypothesis, "<=", 1.0)]),
            "measure": lambda instance, track: {"value": value},
            "judge": lambda measured: [Check("value", measured["value"], "<=", 1.0)],
            "control": "it is doubled",
            "measure_control": lambda instance, track: {"value": control},
            **options,
        }
    )


# --- checks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "relation", "interval", "met"),
    [
        (1.0, "<=", None, True),
        (1.0, ">=", None, True),
        (np.nextafter(1, 2), "<=", None, False),
        (np.nextafter(1, 0), ">=", None, False),
        (math.inf, "<=", None, False),
        (math.inf, ">=", None, True),
        (-math.inf, "<=", None, True),
        (math.nan, "<=", None, False),
        (math.nan, ">=", None, False),
        # The interval decides: all of it on one side, or the check is open.
        (0.5, "<=", (0.2, 1.0), True),
        (0.5, "<=", (0.2, 1.1), None),
        (1.5, "<=", (1.2, 1.8), False),
        (0.5, ">=", (0.2, 0.8), False),
        (1.5, ">=", (0.9, 1.8), None),
        (math.nan, ">=", (2.0, 3.0), False),
    ],
)
def test_a_check_is_met_missed_or_open(value, relation, interval, met):
    check = Check("c", value, relation, 1.0, interval)
    assert check.met is met
    assert str(check).endswith({True: ", met", False: ", missed", None: ", open"}[met])


def test_a_check_in_words():
    assert str(Check("share", 0.5, ">=", 0.9, (0.21, 0.79))) == "share: 0.5 [0.21, 0.79] >= 0.9, missed"
    assert str(Check("gap", 1e-9, "<=", 1e-6)) == "gap: 1e-09 <= 1e-06, met"


def test_relations_and_kinds_are_those_that_there_are():
    with pytest.raises(InputError, match="relation: got '<'; expected one of <=, >="):
        Check("c", 0.0, "<", 1.0)
    with pytest.raises(InputError, match="kind: got 'rates'; .*did you mean 'rate'"):
        claim(kind="rates")
    with pytest.raises(InputError, match="scale: got 'large'"):
        run(claim(), "large")


# --- the verdict -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "verdict", "reason"),
    [
        ({}, "reproduced", "every threshold is met, and the control fails"),
        ({"value": 1.5}, "not reproduced", "missed: value"),
        ({"value": math.nan}, "not reproduced", "missed: value"),
        ({"control": 0.5}, "inconclusive", "the control passes too, so the test shows nothing"),
        ({"control": math.nan}, "reproduced", "every threshold is met, and the control fails"),
        ({"hypothesis": 2.0}, "inconclusive", "the instance does not meet a hypothesis (hypothesis: 2 <= 1, missed)"),
        ({"judge": lambda m: []}, "inconclusive", "the sample does not decide: nothing was checked"),
        (
            {"judge": lambda m: [Check("value", m["value"], "<=", 1.0, (0.0, 2.0))]},
            "inconclusive",
            "the sample does not decide: value",
        ),
        (
            {"judge": lambda m: [Check("a", 2.0, "<=", 1.0, (0.0, 3.0)), Check("b", 2.0, "<=", 1.0)]},
            "not reproduced",
            "missed: b",
        ),
    ],
)
def test_the_verdict(options, verdict, reason):
    finding = run(claim(**options))
    assert (finding.verdict, finding.reason) == (verdict, reason)


def test_nothing_is_measured_where_a_hypothesis_is_not_met():
    def fail(instance, track):
        raise AssertionError

    finding = run(claim(hypothesis=2.0, measure=fail, measure_control=fail))
    assert finding.measured == finding.control_measured == {} and finding.checks == finding.control_checks == []


def test_the_verdict_of_several_claims_is_the_worst():
    order = [Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE, Verdict.REPRODUCED]
    for several in itertools.product(order, repeat=3):
        assert all_of(several) == min(several, key=order.index)
    assert all_of([]) == Verdict.INCONCLUSIVE


# --- a run -----------------------------------------------------------------------------------------


def test_instance_and_track_reach_both_measurements():
    seen, tracked = [], []

    def track(items, what):
        tracked.append(what)
        return items

    def measure(instance, track):
        seen.append(instance)
        return {"value": sum(track(range(3), "numbers"))}

    finding = run(claim(measure=measure, measure_control=measure, judge=lambda m: []), "smoke", track)
    assert seen == [Scale.SMOKE, Scale.SMOKE] and tracked == ["numbers", "numbers"]
    assert finding.scale is Scale.SMOKE and finding.measured == {"value": 3}


@pytest.mark.parametrize("bits", [32, 64])
def test_a_claim_runs_in_its_own_precision(bits):
    def measure(instance, track):
        return {"value": 0.0, "dtype": str(jnp.zeros(1).dtype)}

    before = jax.config.read("jax_enable_x64")
    finding = run(claim(measure=measure, measure_control=measure, precision=bits))
    assert finding.measured["dtype"] == f"float{bits}"
    assert jax.config.read("jax_enable_x64") == before


def test_a_finding_in_words():
    lines = str(run(claim())).splitlines()
    assert lines[0].startswith("one: reproduced (") and lines[0].endswith("s): every threshold is met, and the "
                                                                          "control fails")  # fmt: skip
    assert lines[1:] == [
        "  value: 0.5 <= 1, met",
        "  control, it is doubled:",
        "    value: 2 <= 1, missed",
    ]
