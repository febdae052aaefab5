"""Attacks: what Byzantine workers send, knowing everything.

    attack.messages(honest, place)      (n, m) honest messages to (n, m), those of the Byzantine workers replaced

The last `byzantine` workers are the Byzantine ones. An attack sees the messages of all, decoded, and the state of the
server (`Place`); a `Round` encodes what it says with the codec of the link, so that it can send nothing that the wire
could not carry. Each is usable alone, on any stacked array.

| attack            | a Byzantine worker sends                                                             |
|-------------------|--------------------------------------------------------------------------------------|
| `SignFlip`        | −scale times its own honest message                                                  |
| `RandomSigns`     | its own honest message, each coordinate times ±1 at random                           |
| `LargeNoise`      | Gaussian noise of standard deviation `scale`                                         |
| `LittleIsEnough`  | μ − z σ, mean and standard deviation of the honest messages in each coordinate       |
| `InnerProduct`    | −scale μ                                                                             |
| `SaddlePoint`     | whatever pushes the aggregate back to a saddle, see there                            |
| `NotANumber`      | NaN                                                                                  |

Flipped labels are an attack on the data: `flip_labels`.

Sources: M. Baruch, G. Baruch and Y. Goldberg, *A Little Is Enough* (2019), Algorithm 3; C. Xie, O. Koyejo and I. Gupta,
*Fall of Empires* (2019) (inner product); D. Yin et al., *Defending Against Saddle Point Attack* (2019).
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.errors import InputError, check_count

__all__ = [
    "Attack",
    "InnerProduct",
    "LargeNoise",
    "LittleIsEnough",
    "NotANumber",
    "Place",
    "RandomSigns",
    "SaddlePoint",
    "SignFlip",
    "flip_labels",
]


class Place(NamedTuple):
    """What an attack may know beside the messages: the coordinates of `x` that these are for, and a key."""

    x: Float[Array, " m"]
    key: Any
    first: Any  # the number of the first of these coordinates


class Attack(eqx.Module):
    """`byzantine` workers, the last ones.

    A `Round` refuses more of them than its aggregator tolerates, unless `beyond_tolerance` says that this is what is to
    be seen.
    """

    random: ClassVar[bool] = False

    byzantine: int = eqx.field(static=True)
    beyond_tolerance: bool = eqx.field(static=True, kw_only=True, default=False)

    def __check_init__(self) -> None:
        check_count("byzantine", self.byzantine, 0)

    def check(self, size: int) -> None:
        """Refuse a point of so many coordinates for which the attack was not made."""

    def messages(self, honest: Float[Array, "n m"], place: Place) -> Float[Array, "n m"]:
        """What arrives: the honest messages, and those of the Byzantine workers."""
        count = len(honest) - self.byzantine
        if count < 1:
            raise InputError("byzantine", self.byzantine, f"fewer than the {len(honest)} workers: some are honest")
        if not self.byzantine:
            return honest
        said = self.say(honest[:count], honest[count:], place)
        return jnp.concatenate([honest[:count], jnp.broadcast_to(said, honest[count:].shape).astype(honest.dtype)])

    def say(self, honest: Float[Array, "h m"], own: Float[Array, "b m"], place: Place) -> Array:
        """What the Byzantine workers send, whose honest messages would be `own`: (b, m), or (m,) for all the same."""
        raise NotImplementedError


class SignFlip(Attack):
    """−scale times the own honest message."""

    scale: Any = 1.0

    def say(self, honest: Array, own: Array, place: Place) -> Array:
        return -self.scale * own


class RandomSigns(Attack):
    """The own honest message with random signs."""

    random: ClassVar[bool] = True

    def say(self, honest: Array, own: Array, place: Place) -> Array:
        return own * jax.random.rademacher(place.key, own.shape, own.dtype)


class LargeNoise(Attack):
    """Gaussian noise of standard deviation `scale`."""

    random: ClassVar[bool] = True
    scale: Any = 100.0

    def say(self, honest: Array, own: Array, place: Place) -> Array:
        return self.scale * jax.random.normal(place.key, own.shape, own.dtype)


class LittleIsEnough(Attack):
    """μ − z σ: inside the spread of the honest messages, and yet off.

    `z=None` takes the paper's: the largest with which enough honest workers are further out than the Byzantine ones
    that these make a majority with them, Φ(z) = (n − b − s)/(n − b) with s = ⌊n/2 + 1⌋ − b.
    """

    z: Any = None

    def say(self, honest: Array, own: Array, place: Place) -> Array:
        count, b = len(honest), len(own)
        needed = (count + b) // 2 + 1 - b
        z = float(NormalDist().inv_cdf(np.clip((count - needed) / count, 1e-6, 1 - 1e-6))) if self.z is None else self.z
        return jnp.mean(honest, axis=0) - z * jnp.std(honest, axis=0)


class InnerProduct(Attack):
    """−scale μ: the aggregate, if it believes it, has a negative inner product with the gradient."""

    scale: Any = 1.0

    def say(self, honest: Array, own: Array, place: Place) -> Array:
        return -self.scale * jnp.mean(honest, axis=0)


class SaddlePoint(Attack):
    """Holds a method at a strict saddle s: along its escape directions the messages push back to it.

    On an escape coordinate j a Byzantine worker sends `strength` sign(x_j − s_j) beside the honest mean, elsewhere the
    honest mean; the step −g then goes back to s.

    **Arguments:** `saddle` — s; `escape` — a mask of the escape coordinates, both of the point's size as vectors;
    `strength` — large against a rule by coordinate; `stealth` — the strength in standard deviations of the honest
    messages instead, 1.5 to 2, under which no threshold on the covariance fires.
    """

    saddle: Any
    escape: Any
    strength: Any = 1e3
    stealth: Any = None

    def check(self, size: int) -> None:
        for name, given in (("saddle", self.saddle), ("escape", self.escape)):
            if jnp.shape(given) != (size,):
                raise InputError(name, f"an array of shape {jnp.shape(given)}", f"({size},), the size of the point")

    def say(self, honest: Array, own: Array, place: Place) -> Array:
        def here(whole: Any) -> Array:  # the last block of a message may reach over the end of the point
            piece = honest.shape[1]
            return jax.lax.dynamic_slice_in_dim(jnp.pad(jnp.asarray(whole), (0, piece)), place.first, piece)

        push = self.strength if self.stealth is None else self.stealth * jnp.std(honest, axis=0)
        back = jnp.where(place.x >= here(self.saddle), push, -push)
        return jnp.mean(honest, axis=0) + jnp.where(here(self.escape), back, 0)


class NotANumber(Attack):
    """NaN in every coordinate."""

    def say(self, honest: Array, own: Array, place: Place) -> Array:
        return jnp.full_like(own, jnp.nan)


def flip_labels(labels: Any, byzantine: int, classes: int) -> np.ndarray:
    """The label c of every example of the last `byzantine` workers becomes classes − 1 − c.

    **Arguments:** `labels` — integers of shape (workers, examples).

    **Raises:** `InputError` for labels outside 0 … classes − 1, or more Byzantine workers than there are.
    """
    labels = np.asarray(labels)
    whole = np.issubdtype(labels.dtype, np.integer) and labels.ndim >= 2 and labels.size > 0
    if not whole or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            "labels", f"{labels.dtype}{list(labels.shape)}", f"integers (workers, examples), 0 … {classes - 1}"
        )
    check_count("byzantine", byzantine, 0)
    if byzantine > len(labels):
        raise InputError("byzantine", byzantine, f"at most the number of workers, {len(labels)}")
    flipped = labels.copy()
    flipped[len(labels) - byzantine :] = classes - 1 - flipped[len(labels) - byzantine :]
    return flipped
