"""A round: worker rule → uplink → aggregator → downlink → server rule, freely composed.

    worker i:   v_i = worker(x, data_i);          payload_i = uplink(v_i)           memory of the worker
    receiver:   a = aggregator(payload_1 … payload_n);  payload = downlink(a)      memory of the server
    all:        x ← server(payload, x)

Every part is a small module: codecs and `ErrorFeedback` of `fallline.parts`, and the aggregators, attacks, channels and
rules of this room. A `Round` is a solver of `fallline.minimize` on a `Sharded` problem: simulated where the problem has
no mesh, and real where it has one, by the same code.

With `blocks` B > 1 a message is cut into B equal pieces before it is encoded (the last is filled up with zeros): scale,
k and memory belong to a piece. There are two exchanges. *Gathered*: every device receives all payloads and does what
the server does. *Sliced*: each device receives the pieces that it serves, of all workers, encodes their aggregates, and
these are gathered: both passes carry payloads, and nobody receives n messages.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..core import trees
from ..core.calls import Calls
from ..core.errors import InputError, check_choice, check_count
from ..core.problem import Problem
from ..core.solver import Solver, State
from ..core.stopping import StoppingRule
from ..parts.codecs import Codec
from ..parts.feedback import ErrorFeedback
from .aggregators import Aggregator
from .attacks import Attack, Place
from .channels import Channel, Delays, StaleReads
from .rules import ServerRule, WorkerRule
from .sharded import Sharded
from .wire import from_words, to_words

__all__ = ["Account", "Round", "RoundState"]

Link = Codec | ErrorFeedback


@dataclasses.dataclass(frozen=True)
class Account:
    """Bytes of one round.

    **Fields:** `up` and `down`, what one worker sends and receives in the paper's topology; `dense`, what it would
    send without compression; `transport`, what one process really sends in the exchange over that many devices (its
    payloads, without the headers of the network).
    """

    up: int
    down: int
    dense: int
    transport: int


class RoundState(State):
    """Where a run stands after a round. A leading axis `n` is that of the workers, `b` that of the pieces."""

    rounds: Int[Array, ""]
    batch_value: Float[Array, ""]
    bytes_up: Float[Array, ""]
    bytes_down: Float[Array, ""]
    worker: PyTree  # n, what workers keep
    uplink: Float[Array, "n b s"] | None
    channel: PyTree  # n, b, what is under way
    downlink: Float[Array, "b s"] | None
    server: PyTree
    reads: PyTree


class Round(Solver):
    """See the module's docstring.

    **Arguments:**
    - `worker`: a worker rule, such as `Gradient()`.
    - `uplink`: a codec, or `ErrorFeedback(codec)`.
    - `aggregator`: such as `Mean()`.
    - `downlink`: a codec, or `ErrorFeedback(codec)`; None where there is no server that answers: everybody receives
      all payloads.
    - `server`: a server rule, such as `Step(optax.sgd, learning_rate=0.1)`.
    - `channel`: what happens to payloads on their way up.
    - `attack`: the Byzantine workers, which see everything.
    - `reads`: `StaleReads`, where workers see old models.
    - `blocks`: B, the pieces of a message.
    - `exchange`: `"gathered"` or `"sliced"`; the latter needs blocks that the devices share equally.

    **Raises:** `InputError` for parts that do not fit together; and when a run begins, for a number of workers that the
    aggregator cannot take, or more Byzantine ones than it tolerates.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"workers"})

    worker: WorkerRule
    uplink: Link
    aggregator: Aggregator
    downlink: Link | None
    server: ServerRule
    channel: Channel | None
    attack: Attack | None
    reads: StaleReads | None
    blocks: int = eqx.field(static=True)
    exchange: str = eqx.field(static=True)
    label: str = eqx.field(static=True)

    def __init__(
        self,
        worker: WorkerRule,
        uplink: Link,
        aggregator: Aggregator,
        downlink: Link | None,
        server: ServerRule,
        *,
        channel: Channel | None = None,
        attack: Attack | None = None,
        reads: StaleReads | None = None,
        blocks: int = 1,
        exchange: str = "gathered",
        label: str = "Round",
    ):
        kinds = {
            "worker": (worker, WorkerRule, "a worker rule such as Gradient()"),
            "uplink": (uplink, Link, "a codec such as Signs(), or ErrorFeedback of one"),
            "aggregator": (aggregator, Aggregator, "an aggregator such as Mean()"),
            "downlink": (downlink, Link | None, "a codec such as Signs(), ErrorFeedback of one, or None"),
            "server": (server, ServerRule, "a server rule such as Step(optax.sgd, learning_rate=0.1)"),
            "channel": (channel, Channel | None, "a channel such as Drops(0.1), or None"),
            "attack": (attack, Attack | None, "an attack such as SignFlip(1), or None"),
            "reads": (reads, StaleReads | None, "StaleReads(most), or None"),
        }
        for name, (part, kind, expected) in kinds.items():
            if not isinstance(part, kind):
                got = f"the class {part.__name__}" if isinstance(part, type) else type(part).__name__
                raise InputError(name, got, expected)
        check_count("blocks", blocks, 1)
        check_choice("exchange", exchange, ("gathered", "sliced"))
        if not aggregator.coordinatewise and (blocks > 1 or exchange == "sliced"):
            expected = 'one by coordinate, for more than one block or exchange="sliced"'
            raise InputError("aggregator", type(aggregator).__name__, expected)
        if exchange == "sliced" and downlink is None:
            raise InputError("downlink", None, 'a codec, for exchange="sliced": the aggregates are sent too')
        self.worker, self.uplink, self.aggregator = worker, uplink, aggregator
        self.downlink, self.server = downlink, server
        self.channel, self.attack, self.reads = channel, attack, reads
        self.blocks, self.exchange, self.label = int(blocks), exchange, label

    @property
    def name(self) -> str:
        return self.label

    @property
    def random(self) -> bool:  # type: ignore[override]
        links = [codec_of(link) for link in (self.uplink, self.downlink) if link is not None]
        parts = [*links, self.channel, self.attack]
        return self.reads is not None or any(part is not None and part.random for part in parts)

    def stopping(self) -> StoppingRule | None:
        return None  # minibatches leave a gradient norm that never becomes small

    def check(self, problem: Problem, x: PyTree) -> None:
        assert isinstance(problem, Sharded)
        workers, size = problem.workers, trees.flat_size(x)
        self.aggregator.check(workers.count)
        self.server.check(x)
        if self.attack is not None:
            self._check_attack(workers.count)
            self.attack.check(size)
        if self.blocks > size:
            raise InputError("blocks", self.blocks, f"at most the size of the point, {size}")
        if self.exchange == "sliced" and self.blocks % workers.devices:
            raise InputError("blocks", self.blocks, f"a multiple of the {workers.devices} devices that serve them")
        for link in (self.uplink, self.downlink):  # a k or sizes that do not fit are refused here
            if link is not None:
                codec_of(link).nbytes(self._piece(size), trees.real_dtype(x))
        if isinstance(self.channel, Delays):
            silent, n = codec_of(self.uplink), self._piece(size)
            if bool(jnp.any(silent.decode(silent.encode(jnp.zeros(n), key=jax.random.key(0)), n) != 0)):
                raise InputError("channel", "Delays", f"an uplink that can say nothing; {silent} has no zero")

    def _check_attack(self, n: int) -> None:
        assert self.attack is not None
        b, limit = self.attack.byzantine, self.aggregator.tolerates(n)
        if b >= n:
            raise InputError("attack", f"{b} Byzantine workers", f"fewer than the {n} workers: some are honest")
        if limit is not None and b > limit[0] and not self.attack.beyond_tolerance:
            name = type(self.aggregator).__name__
            raise InputError("attack", f"{b} Byzantine workers of {n}", f"{limit[1]}, which is what {name} tolerates")

    def account(self, problem: Sharded, x: PyTree, devices: int | None = None) -> Account:
        """Bytes of one round; `devices` is the problem's own number of them where it is None."""
        size, dtype = trees.flat_size(x), trees.real_dtype(x)
        workers, piece = problem.workers, self._piece(size)
        devices = workers.devices if devices is None else devices
        local = workers.count // devices
        up = self.blocks * codec_of(self.uplink).nbytes(piece, dtype)
        answer = 0 if self.downlink is None else self.blocks * codec_of(self.downlink).nbytes(piece, dtype)
        down = (workers.count - 1) * up if self.downlink is None else answer
        sent = local * (up + self.blocks * jnp.dtype(dtype).itemsize)  # with each payload a value of the sample
        transport = sent * (devices - 1)
        if self.exchange == "sliced":
            transport = (sent + answer) * (devices - 1) // devices
        return Account(up, down, size * jnp.dtype(dtype).itemsize, transport)

    def _piece(self, size: int) -> int:
        return -(-size // self.blocks)

    def _cut(self, v: Float[Array, " d"]) -> Float[Array, "b s"]:
        return jnp.pad(v, (0, -v.size % self.blocks)).reshape(self.blocks, -1)

    def init(self, problem: Problem, x: PyTree, *, key: Array | None) -> RoundState:
        assert isinstance(problem, Sharded)
        workers, dtype = problem.workers, trees.real_dtype(x)
        piece, codec, sliced = self._piece(trees.flat_size(x)), codec_of(self.uplink), self.exchange == "sliced"

        def stage(_: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            memory = _memory(self.uplink, (self.blocks, piece), dtype)
            channel = None
            if self.channel is not None:
                nothing = codec.encode(jnp.zeros(piece, dtype), key=jax.random.key(0) if codec.random else None)
                channel = _repeat(self.channel.init(nothing), self.blocks)
            kept = _repeat((self.worker.init(x), memory, channel), workers.local)
            served = self.blocks // workers.devices if sliced else self.blocks
            answers = None if self.downlink is None else _memory(self.downlink, (served, piece), dtype)
            return (*kept, answers if sliced else None), (self.server.init(x), None if sliced else answers)

        (worker, uplink, channel, mine), (server, whole) = workers.spread(stage)((), x)
        zero = jnp.zeros((), dtype)
        return RoundState(
            x=x,
            calls=Calls(),
            rounds=jnp.int32(0),
            batch_value=zero,
            bytes_up=zero,
            bytes_down=zero,
            worker=worker,
            uplink=uplink,
            channel=channel,
            downlink=mine if sliced else whole,
            server=server,
            reads=None if self.reads is None else self.reads.init(x),
        )

    def step(self, problem: Problem, state: RoundState, *, key: Array | None) -> RoundState:
        assert isinstance(problem, Sharded)
        sliced = self.exchange == "sliced"
        local = problem.data, state.worker, state.uplink, state.channel, state.downlink if sliced else None
        shared = state.x, state.server, None if sliced else state.downlink, state.reads, state.rounds, key

        def stage(local: PyTree, shared: PyTree) -> tuple[PyTree, PyTree]:
            *mine, answers = local
            x, server, everywhere, reads, rounds, key = shared
            payloads, kept, values = self._up(problem, mine, (x, reads, rounds, key))
            (payloads, values), first = self._exchange(problem, (payloads, _repeat(values, self.blocks).T))
            sent, answers = self._answer(problem, payloads, answers if sliced else everywhere, x, first, key)
            if sliced and problem.workers.mesh is not None:
                sent = _as_words(problem.workers.gather, sent, 1)
            x, server = self._move(sent, x, server)
            value = self._value(values[:, 0])
            return (*kept, answers if sliced else None), (x, server, None if sliced else answers, value)

        (worker, uplink, channel, mine), (x, server, whole, value) = problem.workers.spread(stage)(local, shared)
        rounds, account = state.rounds + 1, self.account(problem, state.x)
        count = rounds.astype(state.bytes_up.dtype)
        return RoundState(
            x=x,
            calls=state.calls + self.worker.calls(problem),
            rounds=rounds,
            batch_value=value.astype(state.batch_value.dtype),
            bytes_up=count * account.up * problem.workers.count,
            bytes_down=count * account.down * problem.workers.count,
            worker=worker,
            uplink=uplink,
            channel=channel,
            downlink=mine if sliced else whole,
            server=server,
            reads=None if self.reads is None else self.reads.push(state.reads, x),
        )

    def _up(self, problem: Sharded, local: PyTree, shared: PyTree) -> tuple[PyTree, PyTree, Array]:
        """Payloads of the workers that are here (local, b, …), what they keep, and their values."""

        def work(one: PyTree, kept: PyTree, shared: PyTree) -> PyTree:
            (number, own), (memory, uplink, channel) = one, kept
            x, reads, rounds, key = shared
            ask, encode, carry, read = _keys(None if key is None else jax.random.fold_in(key, number), 4)
            if self.reads is not None:
                x = self.reads.read(reads, read)
            message, memory, value = self.worker.message(
                problem, x, own, memory, rounds, ask if problem.random else None
            )
            payload, uplink = _send(self.uplink, self._cut(message), uplink, encode)
            uplink = self._inside(uplink, 0, message.size)
            if self.channel is not None:
                payload, channel = _over(self.channel.carry, payload, channel, _block_keys(carry, self.blocks))
            return (payload, value), (memory, uplink, channel)

        own, *kept = local
        (payloads, values), kept = problem.workers.update(work, (problem.workers.ids(), own), tuple(kept), shared)
        return payloads, kept, values

    def _exchange(self, problem: Sharded, payloads: PyTree) -> tuple[PyTree, Any]:
        """What all workers send for the blocks that this device serves, (n, b, …), and the number of the first."""
        workers = problem.workers
        if workers.mesh is None:
            return payloads, 0
        if self.exchange == "gathered":
            return _as_words(workers.gather, payloads, 2), 0
        served = self.blocks // workers.devices
        return _as_words(workers.transpose, payloads, 2), workers.ids()[0] // workers.local * served

    def _answer(
        self, problem: Sharded, payloads: PyTree, memory: PyTree, x: PyTree, first: Any, key: Array | None
    ) -> tuple[PyTree, PyTree]:
        """What the receivers of blocks make of them: the aggregates, encoded, and the memory of that, (b, …) both."""
        flat = trees.flatten(x)

        def serve(item: PyTree, memory: PyTree, shared: PyTree) -> PyTree:
            number, payloads = item
            x, key = shared
            strike, encode = _server_keys(key, problem.workers.count, number)
            payloads = self._received(payloads, x, number, strike)
            aggregate = self.aggregator.of_payloads(payloads, codec_of(self.uplink), x.shape[1]).astype(x.dtype)
            aggregate = self._inside(aggregate, number, flat.size)
            if self.downlink is None:
                return aggregate, None
            sent, memory = _encode(self.downlink, aggregate, memory, encode)
            return sent, self._inside(memory, number, flat.size)

        shared = self._cut(flat), key
        if self.blocks == 1:
            item = jnp.int32(0), jax.tree.map(lambda a: a[:, 0], payloads)
            item, memory, shared = jax.lax.optimization_barrier((item, _first(memory), shared))
            return _alone(jax.lax.optimization_barrier(serve(item, memory, shared)))
        payloads = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), payloads)
        served = jax.tree.leaves(payloads)[0].shape[0]
        return problem.workers.update(serve, (first + jnp.arange(served), payloads), memory, shared)

    def _received(self, payloads: PyTree, x: Float[Array, "B s"], number: Any, key: Array | None) -> PyTree:
        """The payloads of a block; those of the Byzantine workers are what the codec makes of their words."""
        if self.attack is None or not (b := self.attack.byzantine):
            return payloads
        codec, size = codec_of(self.uplink), x.shape[1]
        honest = jax.vmap(lambda payload: codec.decode(payload, size))(payloads)
        place = Place(jax.lax.dynamic_index_in_dim(x, number, keepdims=False), key, number * size)
        said = self.attack.messages(honest, place)[-b:]
        keys = _block_keys(key, b) if codec.random else None
        forged = jax.vmap(lambda v, key: codec.encode(v, key=key))(said, keys)
        return jax.tree.map(lambda a, f: jnp.concatenate([a[:-b], f.astype(a.dtype)]), payloads, forged)

    def _inside(self, blocks: Any, number: Any, size: int) -> Any:
        """Zeros where the last block was filled up; `number` is that of the first of these blocks."""
        if blocks is None or not -size % self.blocks:
            return blocks
        piece = blocks.shape[-1]
        place = number * piece + jnp.arange(blocks.size).reshape(blocks.shape)
        return jnp.where(place < size, blocks, 0)

    def _move(self, sent: PyTree, x: PyTree, server: PyTree) -> tuple[PyTree, PyTree]:
        """What everybody does with the answer: decode it, and make the next model."""
        sent, x, server = jax.lax.optimization_barrier((sent, x, server))
        size = trees.flat_size(x)
        if self.downlink is None:
            aggregate = sent
        else:
            codec = codec_of(self.downlink)
            aggregate = jax.vmap(lambda payload: codec.decode(payload, self._piece(size)))(sent)
        aggregate = aggregate.reshape(-1)[:size]
        moved, server = self.server.apply(aggregate, x, server)
        return trees.cast_like(moved, x), server

    def _value(self, values: Float[Array, " n"]) -> Float[Array, ""]:
        """What is watched for divergence: robust rules do not mind a worker that is lost."""
        if not self.aggregator.robust:
            return jnp.mean(values)
        sound = jnp.isfinite(values)
        mean = jnp.sum(jnp.where(sound, values, 0)) / jnp.maximum(jnp.sum(sound), 1)
        return jnp.where(jnp.any(sound), mean, jnp.nan)

    def cause(self, problem: Problem, state: RoundState, *, key: Array | None) -> str:
        """Whose messages are not finite in the round after `state`; empty where all are."""
        assert isinstance(problem, Sharded)
        workers, size = problem.workers, self._piece(trees.flat_size(state.x))

        def stage(local: PyTree, shared: PyTree) -> tuple[None, Array]:
            payloads, _, _ = self._up(problem, local, shared)
            blocks = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), workers.gather(payloads))
            x, key = self._cut(trees.flatten(shared[0])), shared[3]
            sound = jnp.bool_(True)
            for number in range(self.blocks):
                strike, _ = _server_keys(key, workers.count, number)
                arrived = self._received(jax.tree.map(lambda a, b=number: a[b], blocks), x, number, strike)
                said = jax.vmap(lambda payload: codec_of(self.uplink).decode(payload, size))(arrived)
                sound = sound & jnp.all(jnp.isfinite(said), axis=1)
            return None, ~sound

        local = problem.data, state.worker, state.uplink, state.channel
        lost = jax.jit(lambda local, shared: workers.spread(stage)(local, shared)[1])(
            local, (state.x, state.reads, state.rounds, key)
        )
        numbers = [int(i) for i in np.flatnonzero(np.asarray(lost))]
        some = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
        if not numbers:
            return ""
        if len(numbers) == workers.count > 1:
            return "all workers sent messages that are not finite"
        one = len(numbers) == 1
        return (
            f"worker{'' if one else 's'} {some} sent {'a message that is' if one else 'messages that are'} not finite"
        )


def codec_of(link: Link) -> Codec:
    """The codec of a link, with or without memory."""
    return link.codec if isinstance(link, ErrorFeedback) else link


def _memory(link: Link, shape: tuple[int, ...], dtype: Any) -> Array | None:
    return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)) if isinstance(link, ErrorFeedback) else None


def _encode(link: Link, v: Array, memory: Any, key: Array | None) -> tuple[PyTree, Any]:
    """The payload of one block, and the new memory where the link has one."""
    if isinstance(link, ErrorFeedback):
        return link.encode(v, memory, key=key)
    return link.encode(v, key=key), memory


def _send(link: Link, blocks: Float[Array, "b s"], memory: Any, key: Array | None) -> tuple[PyTree, Any]:
    """`_encode` for each block."""
    keys = _block_keys(key, len(blocks)) if codec_of(link).random else None
    return _over(lambda v, memory, key: _encode(link, v, memory, key), blocks, memory, keys)


def _over(fn: Any, first: PyTree, *rest: PyTree) -> PyTree:
    """`fn` over the leading axis of its arguments; without a batch where that has length 1."""
    if jax.tree.leaves(first)[0].shape[0] > 1:
        return jax.vmap(fn)(first, *rest)
    return _alone(fn(*_first((first, *rest))))


def _first(tree: PyTree) -> PyTree:
    """The only entry along a leading axis of length 1: reshaped, as an index would cost a copy under `vmap`."""
    return jax.tree.map(lambda a: a.reshape(a.shape[1:]), tree)


def _alone(tree: PyTree) -> PyTree:
    """With a leading axis of length 1."""
    return jax.tree.map(lambda a: jnp.reshape(a, (1, *jnp.shape(a))), tree)


def _keys(key: Array | None, count: int) -> list[Any]:
    """Several keys of one, or none of none."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def _server_keys(key: Array | None, count: int, number: Any) -> list[Any]:
    """Those of the attack and of the answer for a block: the server has the number after the workers'."""
    return _keys(None if key is None else jax.random.fold_in(jax.random.fold_in(key, count), number), 2)


def _block_keys(key: Array | None, count: int) -> Array | None:
    return None if key is None else jax.random.split(key, count)


def _repeat(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *jnp.shape(a))), tree)


def _as_words(collective: Any, payload: PyTree, axes: int) -> PyTree:
    """A collective over payloads, stacked along `axes` leading axes, as one buffer of words."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[axes:], a.dtype), payload)
    pack, unpack = to_words, lambda words: from_words(words, one)
    for _ in range(axes):
        pack, unpack = jax.vmap(pack), jax.vmap(unpack)
    return unpack(collective(pack(payload)))
