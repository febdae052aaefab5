"""Lanczos quadrature of one probe against as many Hessian–vector products alone, on networks of 1.1M parameters.

The bare products run in a `fori_loop`, each of the last one's normalized result. Beside them PyHessian's `density` for
the same network, data and number of products, where it is installed (`pip install torch pyhessian`); it calls
`torch.eig`, which PyTorch has no longer, so that `torch.linalg.eigh` stands in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, report

from fallline.core import trees
from fallline.parts.curvature import hessian, lanczos_quadrature
from fallline.problems.digits import digits

try:
    import pyhessian
    import torch
except ImportError:
    torch = None

STEPS = (10, 20)
GOAL = 1.3


def cases():
    """Name, inputs, labels and widths: about 1M parameters each."""
    rng = np.random.default_rng(0)
    batch, labels = rng.standard_normal((256, 784), np.float32), rng.integers(0, 10, 256)
    yield "a batch of 256", batch, labels, (784, 640, 640, 256, 10)
    pixels, labels = digits()
    yield "1797 digits", np.asarray(pixels, np.float32), np.asarray(labels), (64, 960, 960, 64, 10)


def initial(widths):
    rng = np.random.default_rng(1)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return [(rng.standard_normal((m, n), np.float32) / np.float32(m**0.5), np.zeros(n, np.float32)) for m, n in pairs]


def loss(layers, inputs, labels):
    """Mean cross-entropy of a network of tanh."""
    for weight, bias in layers[:-1]:
        inputs = jnp.tanh(inputs @ weight + bias)
    weight, bias = layers[-1]
    logs = jax.nn.log_softmax(inputs @ weight + bias)
    return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], axis=1))


def ours(layers, inputs, labels, steps):
    """The bare products, and the quadrature."""

    @jax.jit
    def bare(layers, inputs, labels):
        product = hessian(loss, layers, inputs, labels)

        def again(_, v):
            image = product(v)
            norm = jnp.sqrt(sum(jnp.vdot(a, a) for a in jax.tree.leaves(image)))
            return jax.tree.map(lambda a: a / norm, image)

        return jax.lax.fori_loop(0, steps, again, layers)

    @jax.jit
    def quadrature(layers, inputs, labels, key):
        return lanczos_quadrature(hessian(loss, layers, inputs, labels), layers, key, steps)

    key = jax.random.key(0)
    return {
        "products": lambda: jax.block_until_ready(bare(layers, inputs, labels)),
        "fallline": lambda: jax.block_until_ready(quadrature(layers, inputs, labels, key)),
    }


def peer(layers, inputs, labels, steps):
    """PyHessian on the same; its gradient, which it keeps for all products, is counted as ours is."""
    torch.eig = _eig
    modules = []
    for weight, bias in layers:
        module = torch.nn.Linear(*weight.shape)
        module.weight.data, module.bias.data = torch.from_numpy(weight.T.copy()), torch.from_numpy(bias.copy())
        modules += [module, torch.nn.Tanh()]
    network = torch.nn.Sequential(*modules[:-1])
    data = torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64))

    def run():
        network.zero_grad(set_to_none=True)
        pyhessian.hessian(network, torch.nn.CrossEntropyLoss(), data=data, cuda=False).density(iter=steps, n_v=1)

    return run


def _eig(matrix, eigenvectors):
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


def main() -> None:
    for name, inputs, labels, widths in cases():
        layers = initial(widths)
        for steps in STEPS:
            runs = ours(layers, inputs, labels, steps)
            times = interleaved(runs, rounds=7, warm=1, pick=min)
            if torch is not None:  # apart, for its runs are seconds long
                times |= interleaved({"PyHessian": peer(layers, inputs, labels, steps)}, rounds=2, warm=1, pick=min)
            rows = {f"{key}, ms a product": 1e3 * seconds / steps for key, seconds in times.items()}
            rows["quadrature over products"] = times["fallline"] / times["products"]
            if "PyHessian" in times:
                rows["PyHessian over fallline"] = times["PyHessian"] / times["fallline"]
            size = trees.flat_size(layers)
            report(f"Lanczos quadrature, {name}, {size / 1e6:.2f}M parameters, {steps} steps", rows, f"at most {GOAL}")


if __name__ == "__main__":
    main()
