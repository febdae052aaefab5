"""Losses between measurements u = A(x) and data y: a value, and the residual that is sent back through A*.

    gradient = A*(v),   v = weight ⊙ residual

A truncated or reweighted loss differs from its plain form by the weights alone, which are held fixed in its value
and gradient: Wirtinger flow, its truncated kin and the sub-gradient method are one loop with different losses.
All are sums over the measurements; the problem divides them by the operator's gain.

| loss                   | residual              | weight                                            |
|------------------------|-----------------------|---------------------------------------------------|
| `Intensity`            | (|u|² − y) u          | 1                                                 |
| `TruncatedPoisson`     | 2 (|u|² − y) / ū      | 1 where ρ and the misfit are neither small nor large |
| `Amplitude`            | u − √y u/|u|          | 1                                                 |
| `TruncatedAmplitude`   | u − √y u/|u|          | 1 where |u| ≥ √y / (1 + γ)                        |
| `ReweightedAmplitude`  | u − √y u/|u|          | |u| / (|u| + β √y)                                |
| `Squared`              | u − y                 | 1                                                 |
| `Absolute`             | sign(u − y)           | 1                                                 |

Sources: E. Candès, X. Li and M. Soltanolkotabi, *Phase Retrieval via Wirtinger Flow* (2015), equation (2.2);
Y. Chen and E. Candès, *Solving Random Quadratic Systems of Equations Is Nearly as Easy as Solving Linear
Systems* (2015), Algorithm 1; G. Wang, G. Giannakis and Y. Eldar, *Solving Systems of Random Quadratic
Equations via Truncated Amplitude Flow* (2016), Algorithm 1; G. Wang, G. Giannakis, Y. Saad and J. Chen,
*Phase Retrieval via Reweighted Amplitude Flow* (2018), Algorithm 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.errors import InputError, check_positive, is_traced

__all__ = [
    "Absolute",
    "Amplitude",
    "Intensity",
    "Loss",
    "ReweightedAmplitude",
    "Squared",
    "TruncatedAmplitude",
    "TruncatedPoisson",
]


def square(u: Array) -> Float[Array, ...]:
    """|u|², smooth for complex numbers too."""
    return jnp.real(u) ** 2 + jnp.imag(u) ** 2 if jnp.iscomplexobj(u) else u**2


def times(factor: Array, u: Array) -> Array:
    """A real factor times u, by parts: JAX would make a complex number of the factor first."""
    if not jnp.iscomplexobj(u):
        return factor * u
    return jax.lax.complex(factor * jnp.real(u), factor * jnp.imag(u))


def modulus(u: Array) -> Float[Array, ...]:
    """|u|, with derivative 0 at 0; the root of the square takes a fraction of the time of `jnp.abs`, which scales."""
    if not jnp.iscomplexobj(u):
        return jnp.abs(u)
    squared = square(u)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def _phase(u: Array, size: Array) -> Array:
    """u/|u|, and 0 at 0."""
    size = jnp.where(size > 0, size, 1)
    return jax.lax.complex(jnp.real(u) / size, jnp.imag(u) / size) if jnp.iscomplexobj(u) else u / size


class Loss(eqx.Module):
    """A sum over measurements.

    `phaseless` says that y are intensities |u|², which no global phase changes; `bounded` that its value is
    never below 0; `separable` that no term depends on other measurements; `step_size` is that of plain gradient
    descent, from its paper. `relative` is √n |uᵢ| / (‖aᵢ‖ ‖x‖): how large a measurement is for its row and signal.
    """

    phaseless: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    step_size: ClassVar[float | None] = None

    def value(self, u: Array, y: Array, relative: Array) -> Float[Array, ""]:
        """The loss."""
        raise NotImplementedError

    def dual(self, u: Array, y: Array, relative: Array) -> Array:
        """The derivative with respect to u in the inner product Re⟨·, ·⟩, weights held fixed."""
        raise NotImplementedError

    def value_and_dual(self, u: Array, y: Array, relative: Array) -> tuple[Float[Array, ""], Array]:
        """Both, for losses that share work between them."""
        return self.value(u, y, relative), self.dual(u, y, relative)

    def unit(self, y: Array, count: Any) -> Any:
        """What the loss over gain is divided by, so that step sizes are numbers without a unit."""
        return 1.0


class Intensity(Loss):
    """¼ Σ (|u|² − y)²: that of Wirtinger flow."""

    step_size: ClassVar[float | None] = 0.1

    def value(self, u: Array, y: Array, relative: Array) -> Float[Array, ""]:
        return jnp.sum((square(u) - y) ** 2) / 4

    def dual(self, u: Array, y: Array, relative: Array) -> Array:
        return times(square(u) - y, u)

    def unit(self, y: Array, count: Any) -> Any:
        return jnp.sum(y) / count


class TruncatedPoisson(Loss):
    """Σ over T of |u|² − y log |u|²: that of truncated Wirtinger flow.

    T = {lower ≤ ρᵢ ≤ upper} ∩ {|yᵢ − |uᵢ|²| ≤ misfit · mean|y − |u|²| · ρᵢ},   ρᵢ = √n |uᵢ| / (‖aᵢ‖ ‖x‖)
    """

    bounded: ClassVar[bool] = False
    separable: ClassVar[bool] = False
    step_size: ClassVar[float | None] = 0.2

    lower: Any = 0.3
    upper: Any = 5.0
    misfit: Any = 5.0

    def __init__(self, lower: float = 0.3, upper: float = 5.0, misfit: float = 5.0):
        for name, number in {"lower": lower, "upper": upper, "misfit": misfit}.items():
            check_positive(name, number)
        if not is_traced((lower, upper)) and lower > upper:
            raise InputError("lower", lower, f"at most upper = {upper:g}")
        self.lower, self.upper, self.misfit = lower, upper, misfit

    def _kept(self, u: Array, y: Array, relative: Array) -> Array:
        off = jnp.abs(y - square(u))
        inside = (self.lower <= relative) & (relative <= self.upper)
        typical = jnp.sum(off) / jnp.maximum(jnp.sum(relative > 0), 1)  # rows of zeros do not count
        return inside & (off <= self.misfit * typical * relative)

    def value(self, u: Array, y: Array, relative: Array) -> Float[Array, ""]:
        kept = self._kept(u, y, relative)
        size = jnp.where(kept, square(u), 1)  # in the place of what is not kept: no NaN comes of it
        return jnp.sum(jnp.where(kept, size - y * jnp.log(size), 0))

    def dual(self, u: Array, y: Array, relative: Array) -> Array:
        kept = self._kept(u, y, relative)
        return times(jnp.where(kept, 2 * (1 - y / jnp.where(kept, square(u), 1)), 0), u)


class Amplitude(Loss):
    """½ Σ w (|u| − √y)² with w = 1: that of amplitude flow."""

    step_size: ClassVar[float | None] = 0.6

    def weight(self, size: Array, amplitude: Array) -> Any:
        """w, from |u| and √y."""
        return 1

    def value(self, u: Array, y: Array, relative: Array) -> Float[Array, ""]:
        size, amplitude = modulus(u), jnp.sqrt(y)
        return jnp.sum(self.weight(size, amplitude) * (size - amplitude) ** 2) / 2

    def dual(self, u: Array, y: Array, relative: Array) -> Array:
        size, amplitude = modulus(u), jnp.sqrt(y)
        return times(self.weight(size, amplitude), u - times(amplitude, _phase(u, size)))


class TruncatedAmplitude(Amplitude):
    """w = 1 where |u| ≥ √y / (1 + γ), else 0: that of truncated amplitude flow."""

    gamma: Any = 0.7

    def __init__(self, gamma: float = 0.7):
        check_positive("gamma", gamma)
        self.gamma = gamma

    def weight(self, size: Array, amplitude: Array) -> Any:
        return (1 + self.gamma) * size >= amplitude


class ReweightedAmplitude(Amplitude):
    """w = |u| / (|u| + β √y): that of reweighted amplitude flow (β = 10 for real signals, 5 for complex ones)."""

    step_size: ClassVar[float | None] = 2.0

    beta: Any = 10.0

    def __init__(self, beta: float = 10.0):
        check_positive("beta", beta)
        self.beta = beta

    def weight(self, size: Array, amplitude: Array) -> Any:
        whole = size + self.beta * amplitude
        return size / jnp.where(whole > 0, whole, 1)


class Squared(Loss):
    """½ Σ |u − y|², of linear measurements."""

    phaseless: ClassVar[bool] = False
    step_size: ClassVar[float | None] = 0.5

    def value(self, u: Array, y: Array, relative: Array) -> Float[Array, ""]:
        return jnp.sum(square(u - y)) / 2

    def dual(self, u: Array, y: Array, relative: Array) -> Array:
        return u - y


class Absolute(Loss):
    """Σ |u − y|, of linear measurements with outliers; the sub-gradient has 0 where u = y."""

    phaseless: ClassVar[bool] = False

    def value(self, u: Array, y: Array, relative: Array) -> Float[Array, ""]:
        return jnp.sum(jnp.abs(u - y))

    def dual(self, u: Array, y: Array, relative: Array) -> Array:
        return jnp.sign(u - y)
