"""The digits dealt out to workers."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

import fallline as fl
from fallline.problems import digits_on_workers

DIGITS: tuple = load_digits(return_X_y=True)


def softmax_losses(x, pixels, labels):
    scores = np.tanh(pixels @ x["hidden"] + x["hidden_bias"]) @ x["output"] + x["output_bias"]
    return np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(labels)), labels]


def test_the_value_is_numpys_mean_over_the_images_that_were_dealt_out(dtype):
    made = digits_on_workers(workers=4, hidden=5)
    x = made.start(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {dtype}
    pixels, labels = DIGITS[0][:1796] / 16, DIGITS[1][:1796]  # four equal shares
    expected = softmax_losses({k: np.asarray(v, float) for k, v in x.items()}, pixels, labels).mean()
    np.testing.assert_allclose(made.problem.value(x), expected, rtol=1e-5 if dtype == np.float32 else 1e-12)
    assert made.measure(x)["training accuracy"] < 0.4


def test_sorted_by_label_a_worker_has_few_of_them():
    shares = np.asarray(digits_on_workers(workers=9, by_label=True).problem.data[1])
    assert max(len(set(share)) for share in shares) <= 3
    assert min(len(set(share)) for share in np.asarray(digits_on_workers(workers=9).problem.data[1])) == 10


def test_a_method_in_rounds_learns_them():
    made = digits_on_workers()
    run = fl.minimize(made.problem, made.start(jax.random.key(0)), fl.double_squeeze(0.3), steps=300, key=0)
    assert made.measure(run.x)["training accuracy"] > 0.95


@pytest.mark.parametrize(
    ("options", "said"),
    [({"hidden": 0}, "hidden: got 0"), ({"workers": 0}, "workers: got 0"), ({"batch_size": 0}, "batch_size: got 0")],
)
def test_bad_input(options, said):
    with pytest.raises(fl.InputError, match=said):
        digits_on_workers(**options)
