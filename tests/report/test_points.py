"""Points in files: what is written comes back, bit for bit and in its form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fallline as fl
from fallline.report.points import load_point, names, save_point

RANDOM = np.random.default_rng(0)
POINTS = {
    "array": RANDOM.standard_normal((2, 3)),
    "float32": RANDOM.standard_normal(4).astype(np.float32),
    "complex": RANDOM.standard_normal(3) + 1j * RANDOM.standard_normal(3),
    "scalar": np.array(0.1),
    "tree": {"file": RANDOM.standard_normal(2), "allow_pickle": [RANDOM.standard_normal(3), np.ones(1)]},
    "tuple": (np.zeros(2), {"w": np.ones((1, 2))}),
}


@pytest.mark.parametrize("kind", POINTS)
def test_a_point_comes_back_bit_for_bit(tmp_path, kind):
    x = POINTS[kind]
    save_point(tmp_path / "x.npz", x)
    back = load_point(tmp_path / "x.npz", x)
    assert jax.tree.structure(back) == jax.tree.structure(x)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(x), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


def test_numpy_reads_the_file(tmp_path):
    save_point(tmp_path / "x.npz", {"a": np.arange(3.0), "b": [np.ones(2)]})
    with np.load(tmp_path / "x.npz") as file:
        assert {name: file[name].tolist() for name in file} == {"a": [0, 1, 2], "b/0": [1, 1]}


def test_the_file_alone_gives_arrays_and_nested_dictionaries(tmp_path):
    save_point(tmp_path / "x.npz", np.arange(3.0))
    assert load_point(tmp_path / "x.npz").tolist() == [0, 1, 2]
    save_point(tmp_path / "y.npz", {"a": {"b": np.arange(2.0)}, "c": np.ones(1)})
    back = load_point(tmp_path / "y.npz")
    assert jax.tree.map(np.ndarray.tolist, back) == {"a": {"b": [0, 1]}, "c": [1]}


def test_bfloat16_comes_back_through_float32(tmp_path):
    x = jnp.array([1.0, 3.140625, -1e30], jnp.bfloat16)
    save_point(tmp_path / "x.npz", x)
    back = load_point(tmp_path / "x.npz", x)
    assert back.dtype == jnp.bfloat16 and np.array_equal(back, np.asarray(x))


def test_a_model_keeps_what_is_no_parameter(tmp_path):
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    other = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(1))
    save_point(tmp_path / "x.npz", model)
    back = load_point(tmp_path / "x.npz", other)
    assert back.activation is other.activation
    assert np.array_equal(back(jnp.ones(2)), model(jnp.ones(2)))
    assert "layers/0/weight" in names(eqx.filter(model, eqx.is_array))


def test_integers_are_read_as_the_numbers_they_are(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    back = load_point(tmp_path / "x.npy", np.zeros(3, np.float32))
    assert back.dtype == np.float32 and back.tolist() == [0, 1, 2]


def test_a_file_is_replaced_whole(tmp_path):
    save_point(tmp_path / "x.npz", np.zeros(100))
    save_point(tmp_path / "x.npz", np.ones(2))
    assert load_point(tmp_path / "x.npz").tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    save_point(tmp_path / "x.npz", {"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(fl.InputError, match=r"start: got .*x.npz with a, b; expected the arrays a, c"):
        load_point(tmp_path / "x.npz", {"a": np.zeros(2), "c": np.zeros(3)}, argument="start")
    with pytest.raises(fl.InputError, match=r"start: got .*x.npz with b of shape \(3,\); expected shape \(4,\)"):
        load_point(tmp_path / "x.npz", {"a": np.zeros(2), "b": np.zeros(4)}, argument="start")
