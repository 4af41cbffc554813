"""The device side of generation: slots that each decode one completion, and the programs that fill and run them."""

from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxpost.compilation import as_written
from jaxpost.platform import platform
from jaxpost.rl.sampling import Sampling, sample
from jaxpost.sharding import constrain


@runtime_checkable
class Sampler(Protocol):
    """What generation needs of a model."""

    @property
    def cache_grows(self) -> bool: ...

    def prefill(self, tokens: Array, lengths: Array, cache_length: int) -> tuple[Array, Any]: ...

    def at_hand(self, *, gather: bool) -> tuple[Any, tuple[Any, ...]]: ...

    def decode(self, tokens: Array, cache: Any, layers: tuple[Any, ...] | None = None) -> tuple[Array, Any]: ...

    def unembed(self, h: Array) -> Array: ...


class Slots(NamedTuple):
    """B completions under way.

    Attributes:
        h: hidden state that the next token is drawn from.
        cache: of the model; its rows are the slots.
        ids, logps: what was drawn so far, with log-probabilities under the distribution it was drawn from.
        counts: how many tokens that is.
        done: nothing more is drawn: the completion has ended, or the slot is free.
        requests: number of the completion, which its random numbers depend on.
        limits: tokens after which it is cut.
        seen: tokens of prompt and completion.
    """

    h: Float[Array, "B D"]
    cache: Any
    ids: Int[Array, "B N"]
    logps: Float[Array, "B N"]
    counts: Int[Array, "B"]
    done: Bool[Array, "B"]
    requests: Int[Array, "B"]
    limits: Int[Array, "B"]
    seen: Bool[Array, "B V"]


class Programs:
    """Compiled for one model, number of tokens of a completion and length of the cache.

    Args:
        graphdef: of the model.
        max_new_tokens: N.
        cache_length: most tokens of a prompt and its completion so far.
        gather: draw tokens with weights that are not split over the axes over which they are when they are trained.

    Attributes:
        max_new_tokens, cache_length: that were given.
    """

    def __init__(self, graphdef: Any, max_new_tokens: int, cache_length: int, gather: bool = True):
        self._graphdef, self.max_new_tokens, self.cache_length = graphdef, max_new_tokens, cache_length
        self.empty = jax.jit(self._empty, static_argnums=1)
        self._gather = gather
        self.at_hand = jax.jit(lambda weights: nnx.merge(graphdef, weights).at_hand(gather=gather))
        self.admit = jax.jit(self._admit, donate_argnums=1, compiler_options=as_written())
        self.decode = jax.jit(self._decode, donate_argnums=2, compiler_options=as_written())
        self.keep = jax.jit(self._keep)
        self.grown = jax.jit(lambda slots: _spread(slots._replace(cache=slots.cache.grown(cache_length))))
        self.finish = jax.jit(lambda slots, chosen: slots._replace(done=slots.done | chosen), donate_argnums=0)

    def near(self, weights: Any) -> tuple[Any, tuple[Any, ...] | None]:
        """The weights for `decode`: the model's, and those of each layer.

        Without `gather` they take no memory of their own, but on CPU, where XLA would slice the layers out of their
        stack at every token.
        """
        if not self._gather and platform() != "cpu":
            return weights, None
        others, layers = self.at_hand(weights)
        return {**others, "layers": weights["layers"]}, layers

    def _empty(self, weights: Any, rows: int) -> Slots:
        """Free slots."""
        model: Any = nnx.merge(self._graphdef, weights)
        tokens, lengths = jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32)
        h, cache = jax.eval_shape(partial(model.prefill, cache_length=self.cache_length), tokens, lengths)
        width = jax.eval_shape(model.unembed, h).shape[-1]
        shape = (rows, self.max_new_tokens)
        h, cache = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), (h, cache))
        return _spread(
            Slots(
                h=h,
                cache=cache,
                ids=jnp.zeros(shape, jnp.int32),
                logps=jnp.zeros(shape, jnp.float32),
                counts=jnp.zeros(rows, jnp.int32),
                done=jnp.ones(rows, bool),
                requests=jnp.zeros(rows, jnp.int32),
                limits=jnp.zeros(rows, jnp.int32),
                seen=jnp.zeros((rows, width), bool),
            )
        )

    def _admit(
        self,
        weights: Any,
        slots: Slots,
        tokens: Array,
        lengths: Array,
        places: Array,
        sources: Array,
        requests: Array,
        limits: Array,
    ) -> Slots:
        """Read prompts once each, and begin completions of them.

        Args:
            weights: of the model.
            slots: some of them free.
            tokens: [P, T] right-padded prompts.
            lengths: [P] of the prompts.
            places: [n] slots to fill; a number beyond the last one is none.
            sources: [n] which prompt each of them completes.
            requests: [n] numbers of the completions.
            limits: [n] of their tokens, at most N.
        """
        model: Any = nnx.merge(self._graphdef, weights)
        h, cache = model.prefill(tokens, lengths, self.cache_length)
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        seen = jnp.zeros((len(tokens), slots.seen.shape[1]), bool)
        seen = seen.at[jnp.arange(len(tokens))[:, None], tokens].max(real)

        def put(old: Array, new: Array) -> Array:
            return old.at[places].set(new[sources], mode="drop")

        return _spread(
            slots._replace(
                h=put(slots.h, h),
                cache=jax.tree.map(put, slots.cache, cache),
                counts=slots.counts.at[places].set(0, mode="drop"),
                done=slots.done.at[places].set(False, mode="drop"),
                requests=slots.requests.at[places].set(requests, mode="drop"),
                limits=slots.limits.at[places].set(limits, mode="drop"),
                seen=put(slots.seen, seen),
            )
        )

    def _decode(
        self,
        weights: Any,
        layers: tuple[Any, ...] | None,
        slots: Slots,
        ends: Array,
        sampling: Sampling,
        seed: Array,
        enough: Array,
        steps: Array,
    ) -> Slots:
        """Draw tokens until `enough` slots are done, at most so many `steps`.

        Args:
            weights: of the model.
            layers: from `near`, as are the weights.
            slots: some of them not done.
            ends: ids that end a completion.
            sampling: the knobs.
            seed: of the run.
            enough: slots, counting those that are done already.
            steps: tokens a slot.
        """
        model: Any = nnx.merge(self._graphdef, weights)
        rows, key = jnp.arange(len(slots.done)), jax.random.key(seed)

        def uniform(request: Array, count: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, request), count))

        def draw(slots: Slots) -> tuple[Array, Array]:
            logits, chances = model.unembed(slots.h), jax.vmap(uniform)(slots.requests, slots.counts)
            plain = lambda: sample(logits, chances, None, sampling)  # noqa: E731
            penalised = lambda: sample(logits, chances, slots.seen, sampling)  # noqa: E731
            return lax.cond(sampling.repetition_penalty == 1, plain, penalised)

        def unfinished(carry: tuple[Array, Slots]) -> Array:
            return (carry[0] < steps) & (jnp.sum(carry[1].done) < enough)

        def body(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
            step, slots = carry
            tokens, logps = draw(slots)
            at = jnp.where(slots.done, self.max_new_tokens, slots.counts)  # beyond the end: written nowhere
            counts = slots.counts + ~slots.done
            ended = jnp.any(tokens[:, None] == ends, axis=1) | (counts >= slots.limits)
            done = slots.done | ended
            h, cache = model.decode(tokens, slots.cache, layers)
            return step + 1, Slots(
                h=h,
                cache=cache._replace(lengths=jnp.where(done, slots.cache.lengths, cache.lengths)),
                ids=slots.ids.at[rows, at].set(tokens, mode="drop"),
                logps=slots.logps.at[rows, at].set(logps, mode="drop"),
                counts=counts,
                done=done,
                requests=slots.requests,
                limits=slots.limits,
                seen=slots.seen.at[rows, tokens].set(True),
            )

        return lax.while_loop(unfinished, body, (jnp.int32(0), slots))[1]

    @staticmethod
    def _keep(slots: Slots, places: Array) -> Slots:
        """Fewer slots: those at `places`, of which one beyond the last is a free one."""
        kept = jax.tree.map(lambda part: part[jnp.minimum(places, len(part) - 1)], slots)
        return _spread(kept._replace(done=kept.done | (places >= len(slots.done))))


@lru_cache(maxsize=32)
def programs(graphdef: Any, max_new_tokens: int, cache_length: int, gather: bool) -> Programs:
    """The programs of a model, made once."""
    return Programs(graphdef, max_new_tokens, cache_length, gather)


def layout(part: Any) -> tuple[str | None, ...]:
    """Logical axes of an array of the slots.

    Every group of devices has its own slots; over `tensor` it splits the heads of the cache's keys and values.
    """
    of_cache = ("heads",) if part.ndim >= 4 else ()
    return ("tokens", *of_cache, *[None] * (part.ndim - 1 - len(of_cache)))


def _spread(slots: Slots) -> Slots:
    return jax.tree.map(lambda part: constrain(part, *layout(part)), slots)
