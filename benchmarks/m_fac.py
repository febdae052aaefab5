"""One M-FAC step against two reads of its window, against the official code's CPU path, and how its cost grows.

The floor of a step is two products with the m × d window, G g and w G, which it cannot do without. The peer, where it
is there (`pip install torch`, and a folder with `optim.py` of github.com/IST-DASLab/M-FAC named in `MFAC`), is its
`HInvFastUpMulti.update_mul` without the CUDA extension, on the same gradients in the same rounds. float32. On a CPU it
does not run as it is: PyTorch has no LU without pivots there, so U comes from a Cholesky factor, which is no slower,
and its `parallel_apply` asks for a GPU, so the single device is called directly.
"""

from __future__ import annotations

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, report

from fallline.descent.m_fac import scale_by_m_fac
from fallline.descent.m_fac_static import inverse_fisher

LAM = 1e-3
SIZES = ((32, 1_000_000), (128, 250_000), (256, 250_000), (512, 100_000), (256, 4_810))


def official():
    """The module `optim` of the official code, or None."""
    try:
        import torch

        sys.path.insert(0, os.environ["MFAC"])
        import optim
    except (ImportError, KeyError):
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def upper(a, pivot):
        factor = torch.linalg.cholesky(a)
        return (factor.diagonal()[:, None] * factor.mT,)

    torch.lu = upper
    torch.nn.parallel.parallel_apply = lambda fns, inputs: [fn(x) for fn, x in zip(fns, inputs, strict=True)]
    optim.USE_CUDA = False
    return optim


def stepper(m, d, gradients):
    """The next update of a run whose window is donated each time, and that window's two products."""
    update = scale_by_m_fac(m, LAM)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, g):
        u, state = update.update(g, state)
        return state, u

    @jax.jit
    def floor(rows, g, w):
        return rows @ g, w @ rows

    carry, t = [update.init(jnp.zeros(d, jnp.float32))], [0]
    for g in gradients:
        carry[0], _ = step(carry[0], g)
    w = jnp.ones(m, jnp.float32)

    def run():
        t[0] += 1
        carry[0], u = jax.block_until_ready(step(carry[0], gradients[t[0] % len(gradients)]))
        return u

    def lowest():
        jax.block_until_ready(floor(carry[0].window.rows, gradients[0], w))

    return run, lowest


def peer(module, m, d, gradients):
    """The official update and product, torch on the CPU."""
    import torch

    device = torch.device("cpu")
    inverse = module.HInvFastUpMulti(torch.zeros((m, d)), device, [device], damp=LAM)
    given, t = [torch.from_numpy(np.array(g)) for g in gradients], [0]
    for g in given:
        inverse.update(g)

    def run():
        t[0] += 1
        return inverse.update_mul(given[t[0] % len(given)])

    return run


def static(m, d):
    gradients = jnp.asarray(np.random.default_rng(1).standard_normal((m, d), dtype=np.float32))
    x, inverse = gradients[0], inverse_fisher(gradients, LAM)
    product = jax.jit(lambda inverse, x: inverse.times(x))
    return {
        "static inverse": lambda: jax.block_until_ready(inverse_fisher(gradients, LAM)),
        "product with it": lambda: jax.block_until_ready(product(inverse, x)),
    }


def steps() -> None:
    module = official()
    draw = np.random.default_rng(0)
    for m, d in SIZES:
        # All different: of equal ones the peer's factor does not exist in float32, and ours takes another try.
        gradients = [jnp.asarray(draw.standard_normal(d, dtype=np.float32) / np.float32(d**0.5)) for _ in range(m + 1)]
        run, lowest = stepper(m, d, gradients)
        runs = {"two products, the floor": lowest, "fallline": run}
        if module is not None:
            runs["official, CPU"] = peer(module, m, d, gradients)
        times = interleaved(runs, rounds=15, warm=2, pick=min)
        rows = {f"{name}, ms": 1e3 * seconds for name, seconds in times.items()}
        rows["ratio to the floor"] = times["fallline"] / times["two products, the floor"]
        if module is not None:
            rows["official over fallline"] = times["official, CPU"] / times["fallline"]
        report(f"M-FAC, m = {m}, d = {d}, a step", rows, "ratio at most 1.5, official at least 3")


def growth() -> None:
    m, d = 128, 100_000
    for name, sizes in (("d", (m, 4 * d)), ("m", (4 * m, d))):
        small, large = static(m, d), static(*sizes)
        for made, (rows, columns) in ((small, (m, d)), (large, sizes)):
            gradients = list(jax.random.normal(jax.random.key(0), (rows + 1, columns)) / np.sqrt(columns))
            made["update of the window"], _ = stepper(rows, columns, gradients)
        runs = {
            f"{key}, {size}": fn for size, made in (("m, d", small), (f"4 {name}", large)) for key, fn in made.items()
        }
        times = interleaved(runs, rounds=7, warm=1, pick=min)
        exponents = {key: float(np.log(times[f"{key}, 4 {name}"] / times[f"{key}, m, d"]) / np.log(4)) for key in small}
        report(f"exponents of {name} from m = {m}, d = {d}", exponents, "1 in d; in m 1, of the static inverse 2")


if __name__ == "__main__":
    steps()
    growth()
