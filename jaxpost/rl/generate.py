"""Completions from a model: the queue of requests, and the slots that they are decoded in.

A prompt is read once for all its completions. A slot whose completion has ended takes the next request (continuous
batching: Yu et al., 2022, "Orca"), and when none is left the batch shrinks with the completions that go on.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpost.errors import ConfigError
from jaxpost.rl.sampling import Sampling
from jaxpost.rl.slots import Programs, Slots, programs

CACHE_MULTIPLE = 64
LEAST_SLOTS = 4  # below, fewer slots are hardly faster
LEAST_TOKENS = 64  # of a completion; for shorter ones, fewer slots are not worth another program
REFILL_SHARE = 8  # slots that are free before the next prompts are read: one in so many
PLAIN = Sampling()
STOP_STEPS = 16  # tokens between two looks for what else ends a completion


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
    sampling: Sampling = PLAIN,
    num_return_sequences: int = 1,
    seed: int = 0,
    first_request: int = 0,
    batch_size: int = 16,
    stop: Callable[[list[int]], int | None] | None = None,
) -> list[Completion]:
    """Complete every prompt, in order; those of one prompt follow each other.

    Args:
        model: a decoder.
        prompts: token ids, each at least one.
        max_new_tokens: length limit of a completion.
        eos_ids: ids that end a completion.
        sampling: how tokens are drawn.
        num_return_sequences: completions of each prompt.
        seed: same seed, prompts and numbers: same completions, whatever the batch size.
        first_request: number of the first completion, which random numbers depend on.
        batch_size: completions decoded together.
        stop: says of the tokens so far after how many of them the completion has ended, None if it goes on.

    Raises:
        ConfigError: an argument out of range, or an empty prompt (its row is named).
    """
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
        ("num_return_sequences", num_return_sequences),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {row} is empty")
    if not len(prompts):
        return []
    graphdef, weights = nnx.split(model)
    room = bucket(max(map(len, prompts))) + max_new_tokens
    compiled = programs(graphdef, max_new_tokens, room + -room % CACHE_MULTIPLE)
    # Prompts of similar length are read together: each costs as much as the longest of them.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    queue = deque(row * num_return_sequences + i for row in order for i in range(num_return_sequences))
    batch = _Batch(compiled, weights, min(_power(batch_size), _power(len(queue))), stop)
    ends = jnp.asarray(sorted(set(eos_ids)) or [-1], jnp.int32)
    completions: list[Completion | None] = [None] * len(queue)
    while queue or batch.active:
        batch.fill(queue, prompts, num_return_sequences, first_request)
        for request, completion in batch.run(ends, sampling, seed, more=len(queue)):
            completions[request] = completion
    return [completion for completion in completions if completion is not None]


class _Batch:
    """Slots, and which request each of them has."""

    def __init__(self, compiled: Programs, weights: Any, rows: int, stop: Callable[[list[int]], int | None] | None):
        self._compiled, self._weights, self._stop = compiled, weights, stop
        self._layers = compiled.layers(weights)
        self._shrinks = compiled.max_new_tokens >= LEAST_TOKENS
        self._slots: Slots = compiled.empty(weights, rows)
        self._requests: list[int | None] = [None] * rows

    @property
    def active(self) -> int:
        """Slots that are in use."""
        return sum(request is not None for request in self._requests)

    def fill(self, queue: deque[int], prompts: Sequence[np.ndarray], per_prompt: int, first_request: int) -> None:
        """Give free slots the next requests."""
        rows = len(self._requests)
        free = [slot for slot, request in enumerate(self._requests) if request is None][: len(queue)]
        if not free:
            return
        requests = [queue.popleft() for _ in free]
        numbers = [request // per_prompt for request in requests]
        unique = sorted(set(numbers), key=numbers.index)
        tokens, lengths = _pad([prompts[number] for number in unique])
        places, sources, ids = (np.full(_power(len(free)), fill, np.int32) for fill in (rows, 0, 0))
        places[: len(free)] = free
        sources[: len(free)] = [unique.index(number) for number in numbers]
        ids[: len(free)] = np.array(requests) + first_request
        self._slots = self._compiled.admit(self._weights, self._slots, tokens, lengths, places, sources, ids)
        for slot, request in zip(free, requests, strict=True):
            self._requests[slot] = request

    def run(self, ends: jax.Array, sampling: Sampling, seed: int, *, more: int) -> list[tuple[int, Completion]]:
        """Decode until there is something to do for the host; the requests that are finished.

        `more` requests wait for a free slot.
        """
        rows, active = len(self._requests), self.active
        if more:
            wanted = min(more, max(1, rows // REFILL_SHARE))
        else:
            wanted = active - rows // 2 if self._shrinks and rows > LEAST_SLOTS else active
        steps = np.iinfo(np.int32).max if self._stop is None else STOP_STEPS
        enough = rows - active + max(1, wanted)
        self._slots = self._compiled.decode(
            self._weights, self._layers, self._slots, ends, sampling, seed, enough, steps
        )
        finished = self._collect(set(np.asarray(ends).tolist()))
        if not more and self._shrinks:
            self._shrink()
        return finished

    def _collect(self, ends: set[int]) -> list[tuple[int, Completion]]:
        slots = self._slots
        done, counts, ids, logps = jax.device_get((slots.done, slots.counts, slots.ids, slots.logps))
        finished, stopped = [], np.zeros(len(done), bool)
        for slot, request in enumerate(self._requests):
            if request is None:
                continue
            tokens = ids[slot, : counts[slot]].tolist()
            kept = None if self._stop is None else self._stop(tokens)
            if kept is None and not done[slot]:
                continue
            stopped[slot] = not done[slot]
            tokens = tokens[:kept]
            ended = kept is not None or tokens[-1] in ends
            finished.append((request, Completion(tokens, logps[slot, : len(tokens)].tolist(), ended)))
            self._requests[slot] = None
        if stopped.any():
            self._slots = self._compiled.finish(self._slots, stopped)
        return finished

    def _shrink(self) -> None:
        """Half as many slots, where that is enough for what is left."""
        rows, active = len(self._requests), self.active
        smaller = max(LEAST_SLOTS, _power(active))
        if not active or smaller >= rows:
            return
        kept = [slot for slot, request in enumerate(self._requests) if request is not None]
        places = np.array(kept + [rows] * (smaller - active), np.int32)
        self._slots = self._compiled.keep(self._slots, places)
        self._requests = [self._requests[slot] for slot in kept] + [None] * (smaller - active)


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes to compile, a quarter of padding at most on average."""
    power = max(16, _power(length))
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _pad(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [P, T] and lengths [P]; missing rows are one token long."""
    rows = _power(len(prompts))
    tokens, lengths = np.zeros((rows, bucket(max(map(len, prompts)))), np.int32), np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths
