"""Your optimizer stopped; is it a minimum? The main job of fallline, on handwritten digits.

A model is trained until its optimizer stops, then widened by units whose weights are zero, as one
grows a trained model, and trained on. The optimizer says that it has converged. `certify` says at
what kind of point, `escape` leaves it, and `minimize` goes on.

Part one is a linear autoencoder, whose global minimum NumPy's SVD knows (Eckart and Young 1936); part
two a classifier, where only the certificate can say what was missed.

    python examples/is_it_a_minimum.py [FOLDER]

writes a report into FOLDER (by default `demo-report`): `index.html`, its pictures and the points.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fallline as fl
from fallline import problems
from fallline.core.records import environment
from fallline.report import figures
from fallline.report.page import Section, write_page
from fallline.report.points import save_point

COMPONENT = "principal component 6"
CAPTION = (
    "Left: the loss through three runs, relative to the minimum of rank 10; the gray line is the escape. "
    "Right: the certified way out, as weights of the 64 pixels, and the component that it is."
)


class Story(NamedTuple):
    """The three runs of one part, and the certificates after the second and the third."""

    narrow: fl.Solution
    stopped: fl.Solution
    saddle: fl.Certificate
    better: fl.Solution
    verdict: fl.Certificate
    seconds: float


def tell(
    small: problems.Instance,
    large: problems.Instance,
    widen: Callable[[Any], Any],
    solver: fl.Solver,
    loose: float,
    tight: float,
) -> Story:
    """Train, widen and train on; certify; escape and train on; certify."""
    clock = time.perf_counter()
    narrow = fl.minimize(
        small.problem, small.start(jax.random.key(0)), solver, steps=20_000, stop=fl.gradient_norm(loose)
    )
    stop = fl.gradient_norm(tight)
    stopped = fl.minimize(large.problem, widen(narrow.x), solver, steps=20_000, stop=stop)
    saddle = fl.certify(large.problem, stopped.x)
    better = fl.minimize(large.problem, fl.escape(saddle), solver, steps=20_000, stop=stop)
    verdict = fl.certify(large.problem, better.x)
    return Story(narrow, stopped, saddle, better, verdict, time.perf_counter() - clock)


def show(heading: str, what: object) -> None:
    print(f"\n{heading}\n{textwrap.indent(str(what), '  ')}")


def accounts(story: Story) -> list[tuple[str, str]]:
    """Calls and times of the whole part, as rows of a table."""
    runs = (story.narrow, story.stopped, story.better)
    calls = sum((run.calls for run in (*runs, story.saddle, story.verdict)), start=fl.Calls())
    solving = sum(run.seconds - run.compile_seconds for run in runs)
    compiling = sum(run.compile_seconds for run in runs)
    certifying = story.saddle.seconds + story.verdict.seconds
    return [
        ("oracle calls", f"{calls}; together {calls.cost():g} gradients"),
        ("time", f"{solving:.2f} s in the optimizer, {compiling:.2f} s compiling, {certifying:.2f} s certifying"),
    ]


def autoencoder() -> tuple[list[Section], str, Any]:
    """Part one: its report, its result in a sentence, and its picture."""
    print("== A linear autoencoder on the digits: rank 5, widened to rank 10 ==")
    small, large = problems.linear_autoencoder(rank=5), problems.linear_autoencoder(rank=10)
    adam = fl.optimizer(optax.adam, learning_rate=optax.cosine_decay_schedule(1e-2, decay_steps=5000))
    story = tell(small, large, lambda x: problems.widen_autoencoder(x, 10), adam, loose=1e-6, tight=1e-12)

    # The same number by another road: the singular values of the data beyond the tenth.
    values, components = problems.principal_components()
    optimum = float(np.sum(values[10:] ** 2))
    before, after = (abs(float(run.value) / optimum - 1) for run in (story.stopped, story.better))
    sixth = problems.leading_pattern(np.asarray(story.saddle.direction["encode"]))
    cosine = abs(float(sixth @ components[5]))

    show("trained at rank 5 by optax.adam", story.narrow)
    show("widened by five zero units, and trained on", story.stopped)
    show("fallline certify", story.saddle)
    show("escape, and trained on", story.better)
    show("fallline certify", story.verdict)
    result = [
        ("minimum of rank 10, by NumPy's SVD", f"{optimum:.12f}"),
        ("relative error where Adam stopped", f"{before:.4f}"),
        ("relative error after the escape", f"{after:.1e}"),
        (f"|cosine| of the way out and {COMPONENT}", f"{cosine:.9f}"),
        *accounts(story),
    ]
    print()
    for name, value in result:
        print(f"  {name:48s} {value}")

    picture = draw(story, optimum, sixth, components[5], cosine)
    lead = (
        f"Adam stopped {before:.0%} above the minimum of rank 10, at a strict saddle; "
        f"the way out is {COMPONENT}, and it leads to the global minimum."
    )
    sections = [
        Section("A linear autoencoder, widened", text=large.description, figures=[(figures.to_svg(picture), CAPTION)]),
        Section("Against NumPy's singular values", table=result),
        *certificates(story),
    ]
    return sections, lead, (story, picture)


def classifier() -> tuple[list[Section], Any]:
    """Part two: its report."""
    print("\n\n== A tanh classifier of the digits: 3 hidden units, widened to 6 ==")
    small, large = problems.tanh_classifier(hidden=3), problems.tanh_classifier(hidden=6)
    lbfgs = fl.optimizer(optax.lbfgs)
    story = tell(small, large, lambda x: problems.widen_classifier(x, 6), lbfgs, loose=1e-6, tight=1e-9)
    before, after = (large.measure(run.x)["test accuracy"] for run in (story.stopped, story.better))

    show("widened by three zero units, and trained on by optax.lbfgs", story.stopped)
    show("fallline certify", story.saddle)
    show("escape, and trained on", story.better)
    show("fallline certify", story.verdict)
    result = [
        ("loss where L-BFGS stopped", f"{float(story.stopped.value):.6f}"),
        ("loss after the escape", f"{float(story.better.value):.6f}"),
        ("test accuracy where L-BFGS stopped", f"{before:.1%}"),
        ("test accuracy after the escape", f"{after:.1%}"),
        *accounts(story),
    ]
    print()
    for name, value in result:
        print(f"  {name:48s} {value}")
    sections = [
        Section("A tanh classifier, widened", text=large.description, table=result),
        *certificates(story),
    ]
    return sections, story


def certificates(story: Story) -> list[Section]:
    return [
        Section("Certificate where the optimizer stopped", code=str(story.saddle)),
        Section("Certificate after the escape", code=str(story.verdict)),
    ]


def draw(story: Story, optimum: float, direction: Any, component: Any, cosine: float) -> Any:
    """The loss above its minimum through the three runs, the way out, and the component it is."""
    figure = figures.new_figure(9.6, 3.1)
    axis, left, right = figure.subplots(1, 3, width_ratios=[2.1, 1, 1])
    begin = 0
    runs = (("rank 5", story.narrow), ("widened to rank 10", story.stopped), ("after the escape", story.better))
    for (label, run), color in zip(runs, figures.INK, strict=False):
        steps = begin + run.history["step"]
        excess = np.maximum(np.asarray(run.history["value"]) / optimum - 1, 1e-16)
        axis.semilogy(steps, excess, color=color, linewidth=1.6, label=label)
        begin = steps[-1]
    axis.axvline(
        len(story.narrow.history["step"]) + len(story.stopped.history["step"]) - 2, color="#999", linewidth=0.8
    )
    axis.set(xlabel="step", ylabel="loss / minimum − 1", ylim=(3e-17, 300))
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    figures.show_image(left, "the way out of the saddle", problems.as_image(direction))
    figures.show_image(right, f"{COMPONENT}\n(|cosine| {cosine:.6f})", problems.as_image(component))
    return figure


def main(folder: Path) -> None:
    jax.config.update("jax_enable_x64", True)
    first, lead, (linear, picture) = autoencoder()
    second, tanh = classifier()
    folder.mkdir(parents=True, exist_ok=True)
    for name, story in {"autoencoder": linear, "classifier": tanh}.items():
        save_point(folder / f"{name}-saddle.npz", story.stopped.x)
        save_point(folder / f"{name}-direction.npz", story.saddle.direction)
        save_point(folder / f"{name}-minimum.npz", story.better.x)
    picture.savefig(folder / "demo.png", dpi=110)
    about = environment()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    write_page(
        folder / "index.html",
        title="Your optimizer stopped; is it a minimum?",
        lead=lead,
        sections=[*first, *second],
        footer=f"{versions}; {about['device']}. To repeat it: python examples/is_it_a_minimum.py",
    )
    print(f"\nsolved in {linear.seconds + tanh.seconds:.1f} s; the report: {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-report"))
