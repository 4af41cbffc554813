"""Completions from a model: jitted prefill, then a `lax.while_loop` of decode steps over a KV cache."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxpost.errors import ConfigError
from jaxpost.rl.sampling import sample


class Sampler(Protocol):
    """What generation needs of a model."""

    def prefill(self, tokens: Array, lengths: Array, cache_length: int) -> tuple[Array, Any]: ...

    def decode(self, tokens: Array, cache: Any) -> tuple[Array, Any]: ...

    def unembed(self, h: Array) -> Array: ...


class Completion(NamedTuple):
    """One answer.

    Attributes:
        tokens: ids, the end token included if there was one.
        logps: log-probability of each id under the sampling distribution, nats.
        ended: False when it was cut at the maximum length.
    """

    tokens: list[int]
    logps: list[float]
    ended: bool


def generate(
    model: nnx.Module,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Completion]:
    """Complete every prompt, in order.

    Args:
        model: a decoder.
        prompts: token ids, each at least one.
        max_new_tokens: length limit of a completion.
        eos_ids: ids that end a completion.
        temperature: 0 for greedy.
        seed: same seed, prompts and batch size: same completions.
        batch_size: rows decoded together.

    Raises:
        ConfigError: an argument out of range, or an empty prompt (its row is named).
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ConfigError(f"temperature is {temperature}; it must not be negative (0 is greedy)")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {row} is empty")
    graphdef, state = nnx.split(model)
    run = _compiled(graphdef, max_new_tokens)
    ends = jnp.asarray(sorted(set(eos_ids)) or [-1], jnp.int32)
    completions: list[Completion | None] = [None] * len(prompts)
    # Prompts of similar length share a batch: a row costs as much as the longest of its batch.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for number, begin in enumerate(range(0, len(order), batch_size)):
        rows = order[begin : begin + batch_size]
        tokens, lengths = _pad([prompts[row] for row in rows], batch_size)
        key = jax.random.fold_in(jax.random.key(seed), number)
        ids, logps, counts = jax.device_get(run(state, tokens, lengths, len(rows), ends, temperature, key))
        for slot, row in enumerate(rows):
            chosen = ids[slot, : counts[slot]].tolist()
            completions[row] = Completion(chosen, logps[slot, : counts[slot]].tolist(), chosen[-1] in set(eos_ids))
    return [completion for completion in completions if completion is not None]


def _pad(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad to the next power of two, so that few shapes are compiled; missing rows are one token long."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((rows, max(16, 1 << (longest - 1).bit_length())), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


@lru_cache(maxsize=8)
def _compiled(graphdef: Any, max_new_tokens: int) -> Callable[..., tuple[Array, Array, Array]]:
    def run(
        state: Any, tokens: Array, lengths: Array, num_rows: Array, ends: Array, temperature: Array, key: Array
    ) -> Any:
        model: Any = nnx.merge(graphdef, state)
        rows = tokens.shape[0]
        h, cache = model.prefill(tokens, lengths, tokens.shape[1] + max_new_tokens)

        def draw(h: Array, index: Array) -> tuple[Array, Array]:
            return sample(model.unembed(h), jax.random.fold_in(key, index), temperature)

        def unfinished(carry: tuple) -> Array:
            index, _, _, _, _, done, _ = carry
            return (index < max_new_tokens) & ~jnp.all(done)

        def body(carry: tuple) -> tuple:
            index, h, cache, ids, logps, done, counts = carry
            new, logp = draw(h, index)
            ids = ids.at[:, index].set(jnp.where(done, 0, new))
            logps = logps.at[:, index].set(jnp.where(done, 0.0, logp))
            counts = counts + ~done
            done = done | jnp.any(new[:, None] == ends, axis=1)
            h, cache = model.decode(new, cache)
            return index + 1, h, cache, ids, logps, done, counts

        start = (
            jnp.int32(0),
            h,
            cache,
            jnp.zeros((rows, max_new_tokens), jnp.int32),
            jnp.zeros((rows, max_new_tokens), jnp.float32),
            jnp.arange(rows) >= num_rows,
            jnp.zeros(rows, jnp.int32),
        )
        _, _, _, ids, logps, _, counts = lax.while_loop(unfinished, body, start)
        return ids, logps, counts

    return jax.jit(run)
