"""How the suite runs each method of the catalog that is a solver or a transformation: one case a method."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from conformance.checks import Case, counted, ticked
from fallline import (
    FiniteSum,
    InnerProductTest,
    KMeans,
    TargetLoss,
    adadagrad,
    adaptive_saddle_escape,
    diffgrad,
    last_iterate,
    m_fac,
    optimizer,
    perturbed_gradient_descent,
    power_k_means,
    psgd_lie_groups,
    random_init_phase_retrieval,
    rapgrad_rapdual,
    robust_pca,
    subgm_robust_recovery,
    target_surrogate,
)
from fallline.distributed.aggregators import Median
from fallline.distributed.byzantine_pgd import byzantine_pgd
from fallline.distributed.double_squeeze import double_squeeze
from fallline.distributed.mem_sgd import mem_sgd
from fallline.distributed.sharded import Sharded
from fallline.distributed.sign_sgd_majority_vote import sign_sgd_majority_vote
from fallline.distributed.topk_sparsified import topk_sparsified
from fallline.parts.lie_groups import LowRank
from fallline.parts.prox import L1
from fallline.recovery import (
    PSD,
    Absolute,
    Dense,
    Factors,
    Intensity,
    ObservedMatrix,
    Recovery,
    Squared,
    Trimmed,
    TwoFactors,
    Vector,
)
from fallline.recovery.overparam_matrix_sensing import overparam_matrix_sensing


def saddle(x):
    """A quartic with a strict saddle at 0 and minima at ±e₁ of value −1/4."""
    curvatures = jnp.linspace(0.5, 3.0, x.size, dtype=x.dtype).at[0].set(-1.0)
    return jnp.sum(0.5 * curvatures * x**2 + 0.25 * x**4)


def near_the_saddle(dtype):
    """37 coordinates, as no other array of a compiled step has."""
    return jnp.asarray(1e-3 + 0.3 * np.sin(np.arange(37.0)), dtype)


class CountedKMeans(KMeans):
    """A k-means problem that counts its passes over the data."""

    tick: Any = eqx.field(static=True)

    def __init__(self, data, tick):
        super().__init__(data)
        self.tick = tick

    def squared_distances(self, x):
        ticked(self.tick, "gradient")
        return super().squared_distances(x)


def three_clusters(dtype, tick):
    """37 points in the plane."""
    draw = np.random.default_rng(0)
    data = np.repeat([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], [12, 12, 13], axis=0) + 0.5 * draw.normal(size=(37, 2))
    return CountedKMeans(jnp.asarray(data, dtype), tick)


class CountedRecovery(Recovery):
    """A recovery problem that counts its values and gradients."""

    tick: Any = eqx.field(static=True)

    def __init__(self, op, y, structure, loss, tick):
        super().__init__(op, y, structure, loss)
        self.tick = tick

    def value(self, x):
        ticked(self.tick, "value")
        return super().value(x)

    def value_and_gradient(self, x):
        ticked(self.tick, "gradient")
        return super().value_and_gradient(x)

    def signal_gradient(self, x):
        ticked(self.tick, "gradient")
        return super().signal_gradient(x)


def intensities(dtype, tick):
    """150 intensities of a signal of 37 coordinates, of norm 1."""
    rows, signal = np.sin(np.arange(150 * 37.0) ** 1.5).reshape(150, 37), np.cos(np.arange(37.0))
    y = (rows @ signal) ** 2 / (signal @ signal)
    return CountedRecovery(jnp.asarray(rows, dtype), jnp.asarray(y, dtype), Vector(), Intensity(), tick)


def wide(dtype):
    """What data of a point in this dtype have: singular vectors are computed in 32 bits at least."""
    return jnp.promote_types(dtype, jnp.float32)


def with_gross_errors(dtype, tick):
    """A 19 × 11 matrix of rank 3 with 20 entries that are off by 5."""
    rows, columns = np.sin(np.arange(57.0) ** 2).reshape(19, 3), np.cos(np.arange(33.0) ** 2).reshape(11, 3)
    y = rows @ columns.T + 5 * (np.arange(209).reshape(19, 11) % 10 == 3)
    return CountedRecovery(
        ObservedMatrix(y.shape, None), jnp.asarray(y, wide(dtype)), TwoFactors(3, 1.0), Trimmed(0.2), tick
    )


def two_factors(dtype):
    pairs = (np.sin(1 + np.arange(57.0)).reshape(19, 3), np.cos(np.arange(33.0)).reshape(11, 3))
    return Factors(*(jnp.asarray(a, dtype) for a in pairs))


def with_outliers(dtype, tick):
    """150 measurements of a 7 × 7 matrix of rank 1, every fifth of them off by 10."""
    rows, u = np.sin(np.arange(150 * 49.0) ** 1.5).reshape(150, 49), np.cos(np.arange(7.0))
    y = rows @ np.outer(u, u).ravel() + 10 * (np.arange(150) % 5 == 0)
    op = Dense(jnp.asarray(rows, wide(dtype)), (7, 7))
    return CountedRecovery(op, jnp.asarray(y, wide(dtype)), PSD(3), Absolute(), tick)


def on(fn, start, solver, other, **options):
    """A case for a method that asks values, gradients and products of a function of the user's."""
    return Case(solver, other, lambda dtype, tick: counted(fn, tick), start, **options)


def tanh_of_rows(x, rows):
    return jnp.tanh(rows @ x)


def logistic(targets, labels):
    return jnp.logaddexp(0.0, -labels * targets)


class CountedTargets(TargetLoss):
    """A `TargetLoss` that counts the passes through its model: forward and back, forward alone, or on a minibatch."""

    tick: object = eqx.field(static=True, default=None)

    def __init__(self, dtype, tick, batch_size=None):
        inputs = np.sin(np.arange(11 * 37.0) ** 1.5).reshape(11, 37)
        labels = np.where(np.arange(11) % 3 == 0, 1.0, -1.0)
        data = (jnp.asarray(inputs, dtype), jnp.asarray(labels, dtype))
        super().__init__(tanh_of_rows, logistic, data, batch_size)
        self.tick = tick

    def targets(self, x, inputs):
        whole, plain = len(inputs) == self.size, super().targets

        @jax.custom_vjp
        def counted_targets(x, inputs):
            ticked(self.tick, "value" if whole else "minibatch")
            return plain(x, inputs)

        def forward(x, inputs):
            ticked(self.tick, "gradient" if whole else "minibatch")
            return jax.vjp(plain, x, inputs)

        counted_targets.defvjp(forward, lambda back, cotangent: back(cotangent))
        return counted_targets(x, inputs)


def matrices(dtype, tick):
    """90 measurements of a 37 × 3 matrix of rank 1 and singular value 1."""
    rows = np.sin(np.arange(90 * 111.0) ** 1.5).reshape(90, 111)
    left, right = np.cos(np.arange(37.0)), np.array([1.0, 2.0, -2.0])
    matrix = np.outer(left / np.sqrt(left @ left), right / 3)
    op, y = Dense(jnp.asarray(rows, dtype), (37, 3)), jnp.asarray(rows @ matrix.ravel(), dtype)
    return CountedRecovery(op, y, TwoFactors(2, balance=0.0), Squared(), tick)


def factors(dtype):
    left, right = np.sin(1 + np.arange(74.0) ** 2) / 10, np.cos(np.arange(6.0)) / 10
    return Factors(jnp.asarray(left.reshape(37, 2), dtype), jnp.asarray(right.reshape(3, 2), dtype))


def of_hidden_signs(x, batch):
    rows, labels = batch
    return logistic(tanh_of_rows(x, rows), labels)


class CountedShards(Sharded):
    """8 workers with 5 examples each, in 37 coordinates; what all workers are asked at once counts once."""

    tick: Any = eqx.field(static=True)

    def __init__(self, dtype, tick, batch_size=3):
        rows = np.sin(np.arange(40 * 37.0) ** 1.5).reshape(8, 5, 37)
        labels = np.where(np.arange(40) % 3 == 0, 1.0, -1.0).reshape(8, 5)
        super().__init__(of_hidden_signs, (jnp.asarray(rows, dtype), jnp.asarray(labels, dtype)), batch_size)
        self.tick = tick

    def ask(self, x, own, key):
        ticked(self.tick, "gradient" if key is None else "minibatch")
        return super().ask(x, own, key)

    def value(self, x):
        ticked(self.tick, "value")
        return super().value(x)


def mild_losses(x, batch):
    rows, labels = batch
    return 0.5 * (rows @ x / 4 - labels) ** 2 + 0.05 * jnp.sum(jnp.cos(x))


class CountedExamples(FiniteSum):
    """11 examples in 37 coordinates that count the gradients of single ones: a pass over all is 11 minibatches of 1."""

    tick: Any = eqx.field(static=True, default=None)

    def __init__(self, dtype, tick):
        rows = np.sin(np.arange(11 * 37.0) ** 1.5).reshape(11, 37)
        labels = np.where(np.arange(11) % 3 == 0, 1.0, -1.0)
        super().__init__(mild_losses, (jnp.asarray(rows, dtype), jnp.asarray(labels, dtype)), batch_size=1)
        self.tick = tick

    def per_example_gradients(self, x, batch):
        for _ in range(len(batch[1])):
            ticked(self.tick, "minibatch")
        return super().per_example_gradients(x, batch)


class CountedMicroBatches(FiniteSum):
    """40 examples in 37 coordinates, in micro-batches of 3; a pass over one of them counts once."""

    tick: Any = eqx.field(static=True)

    def __init__(self, dtype, tick):
        rows = np.sin(np.arange(40 * 37.0) ** 1.5).reshape(40, 37)
        labels = np.where(np.arange(40) % 3 == 0, 1.0, -1.0)
        super().__init__(of_hidden_signs, (jnp.asarray(rows, dtype), jnp.asarray(labels, dtype)), batch_size=3)
        self.tick = tick

    def losses(self, x, batch):
        if len(batch[1]) == self.batch_size:  # neither one row of it nor all
            ticked(self.tick, "minibatch")
        return super().losses(x, batch)

    def per_example_gradients(self, x, batch):  # asked beside the losses of the same rows, which count
        return super().per_example_gradients(x, batch)

    def value(self, x):
        ticked(self.tick, "value")
        return super().value(x)

    def value_and_gradient(self, x):
        ticked(self.tick, "gradient")
        return jax.value_and_grad(super().value)(x)


CASES = {
    "power-k-means": Case(
        lambda: power_k_means(-1.0, eta=1.2),
        lambda: power_k_means(-2.0, eta=1.1),
        three_clusters,
        lambda dtype: jnp.asarray([[0.5, 0.1], [0.2, 1.0], [1.0, 1.0]], dtype),
    ),
    "perturbed-gradient-descent": on(
        saddle,
        near_the_saddle,
        lambda: perturbed_gradient_descent(0.1, radius=0.05, gradient_threshold=1.0, patience=5),
        lambda: perturbed_gradient_descent(0.05, radius=0.01, gradient_threshold=2.0, patience=4),
        copies=2,  # x̃ ← x where it perturbs, x ← x̃ where it returns
    ),
    "diffgrad": on(
        saddle,
        near_the_saddle,
        lambda: optimizer(diffgrad, learning_rate=0.1),
        lambda: optimizer(diffgrad, learning_rate=0.05),
        copies=3,  # g_prev ← g, and two on the way that the compiler makes of it
    ),
    "adaptive-saddle-escape": on(
        saddle,
        near_the_saddle,
        lambda: optimizer(
            adaptive_saddle_escape, learning_rate=0.1, big_learning_rate=0.2, t_thresh=5, beta=0.9, burn_in=3, eps=1e-3
        ),
        lambda: optimizer(
            adaptive_saddle_escape,
            learning_rate=0.05,
            big_learning_rate=0.3,
            t_thresh=7,
            beta=0.95,
            burn_in=5,
            eps=2e-3,
        ),
    ),
    "last-iterate": on(
        saddle,
        near_the_saddle,
        lambda: optimizer(last_iterate, eta=0.5, steps=25, smoothness=3.0, prox=L1(0.01)),
        lambda: optimizer(last_iterate, eta=0.25, steps=30, smoothness=4.0, prox=L1(0.01)),
    ),
    "rapgrad-rapdual": Case(
        lambda: rapgrad_rapdual(CountedExamples("float64", None), mu=0.05, smoothness=2.0),
        lambda: rapgrad_rapdual(CountedExamples("float64", None), mu=0.06, smoothness=3.0),
        CountedExamples,
        near_the_saddle,
        steps=6,
        copies=11,  # vectors alone, no table: the iterates of the inner loop, the center, the random one that is kept
    ),
    "adadagrad": Case(
        lambda: adadagrad(0.5, test=InnerProductTest(0.5, 1.0), batch_size=5, max_batch_size=30, replace=False),
        lambda: adadagrad(
            0.4, test=InnerProductTest(0.4, 2.0), batch_size=4, max_batch_size=33, test_interval=2, replace=False
        ),
        CountedMicroBatches,
        near_the_saddle,
        copies=2,  # x and g, which the loops over micro-batches share with the update
    ),
    "m-fac": on(
        saddle,
        near_the_saddle,
        lambda: optimizer(m_fac, learning_rate=0.05, m=5, lam=1e-1),
        lambda: optimizer(m_fac, learning_rate=0.02, m=5, lam=2e-1),
    ),
    "psgd-lie-groups": on(
        saddle,
        near_the_saddle,
        lambda: optimizer(psgd_lie_groups, learning_rate=0.1, group=LowRank(2), whole=True, step=0.2),
        lambda: optimizer(psgd_lie_groups, learning_rate=0.05, group=LowRank(2), whole=True, step=0.1),
    ),
    "target-surrogate": Case(
        # A fixed inner step: a line search would walk back from NaN.
        lambda: target_surrogate(4.0, inner_steps=4, inner=optimizer(optax.sgd, learning_rate=1.0)),
        lambda: target_surrogate(2.0, inner_steps=3, inner=optimizer(optax.sgd, learning_rate=0.5)),
        CountedTargets,
        near_the_saddle,
    ),
    "random-init-phase-retrieval": Case(
        lambda: random_init_phase_retrieval(0.1),
        lambda: random_init_phase_retrieval(0.05),
        intensities,
        lambda dtype: jnp.asarray(np.sin(1 + np.arange(37.0) ** 2) / 5, dtype),
    ),
    "overparam-matrix-sensing": Case(
        lambda: overparam_matrix_sensing(0.2, beta=0.5, threshold=0.5),
        lambda: overparam_matrix_sensing(0.1, beta=0.7, threshold=0.4),
        matrices,
        factors,
        copies=4,  # what LAPACK is handed and hands back, at the one step of the change
    ),
    "robust-pca": Case(
        lambda: robust_pca(0.5),
        lambda: robust_pca(0.3, incoherence=2.0),
        with_gross_errors,
        two_factors,
        copies=2,  # x and its gradient, from which the rows' norms and then the new point are made
    ),
    "subgm-robust-recovery": Case(
        lambda: subgm_robust_recovery(0.3, 0.95),
        lambda: subgm_robust_recovery(0.2, 0.93),
        with_outliers,
        lambda dtype: jnp.asarray(0.1 * np.sin(np.arange(21.0) ** 2).reshape(7, 3), dtype),
    ),
    "double-squeeze": Case(
        lambda: double_squeeze(0.1),
        lambda: double_squeeze(0.05),
        CountedShards,
        near_the_saddle,
    ),
    "topk-sparsified": Case(
        lambda: topk_sparsified(0.1, 4),
        lambda: topk_sparsified(0.05, 4),
        CountedShards,
        near_the_saddle,
    ),
    "byzantine-pgd": Case(
        lambda: byzantine_pgd(0.2, Median(), gradient_threshold=0.4, radius=0.3, distance=0.2, patience=3, attempts=3),
        lambda: byzantine_pgd(0.1, Median(), gradient_threshold=0.3, radius=0.2, distance=0.1, patience=4, attempts=4),
        CountedShards,
        near_the_saddle,
        copies=3,  # the candidate and the anchor are copies of x, and x is the candidate again where it returns
    ),
    "mem-sgd": Case(
        lambda: mem_sgd(strong_convexity=1.0, shift=37.0),
        lambda: mem_sgd(strong_convexity=2.0, shift=40.0, gamma=3.0),
        CountedShards,
        near_the_saddle,
        copies=1,  # x_t, which both the average and the next step read
    ),
    "sign-sgd-majority-vote": Case(
        lambda: sign_sgd_majority_vote(0.02),
        lambda: sign_sgd_majority_vote(0.01, 0.5, weight_decay=0.1),
        CountedShards,
        near_the_saddle,
    ),
}
