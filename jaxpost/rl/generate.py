"""Completions from a model: the queue of requests, and the slots that they are decoded in.

A prompt is read once for all its completions. A slot whose completion has ended takes the next request (continuous
batching: Yu et al., 2022, "Orca"), and when none is left the batch shrinks with the completions that go on.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxpost.errors import ConfigError
from jaxpost.processes import check, fetch
from jaxpost.rl.sampling import Sampling
from jaxpost.rl.slots import Programs, Slots, programs

CACHE_MULTIPLE = 64
MOST_PROMPTS = 16  # that are read together
LEAST_SLOTS = 4  # below, fewer slots are hardly faster
LEAST_TOKENS = 64  # of a completion; for shorter ones, fewer slots are not worth another program
REFILL_SHARE = 8  # slots that are free before the next prompts are read: one in so many
PLAIN = Sampling()
STOP_STEPS = 16  # tokens between two looks for what else ends a completion
ROOM = 256  # tokens, at least, that prompts are padded to where few programs are wanted
LOOK_STEPS = 64  # tokens after which the host looks anyway, as the run may have been told to stop


class Completion(NamedTuple):
    """One answer.

    Attributes:
        tokens: ids, the end token included if there was one.
        logps: log-probability of each id under the sampling distribution, nats.
        ended: False when it was cut at the maximum length.
        own: which tokens the policy drew; None for all. Others stand there as what it has been told, by a tool say.
    """

    tokens: list[int]
    logps: list[float]
    ended: bool
    own: list[bool] | None = None

    @property
    def is_own(self) -> np.ndarray:
        """Which tokens the policy drew, bool [N]."""
        return np.ones(len(self.tokens), bool) if self.own is None else np.asarray(self.own, bool)

    @property
    def num_own(self) -> int:
        """How many that are."""
        return int(self.is_own.sum())


def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    limits: Sequence[int] | None = None,
    sampling: Sampling = PLAIN,
    num_return_sequences: int = 1,
    seed: int = 0,
    first_request: int = 0,
    batch_size: int = 16,
    stop: Callable[[list[int]], int | None] | None = None,
    stop_steps: int = STOP_STEPS,
    gather: bool = True,
    roomy: bool = False,
) -> list[Completion]:
    """Complete every prompt, in order; those of one prompt follow each other.

    Args:
        model: a decoder.
        prompts: token ids, each at least one.
        max_new_tokens: length limit of a completion.
        eos_ids: ids that end a completion.
        limits: of the completions of each prompt, where they are not all `max_new_tokens`, which no limit is above.
        sampling: how tokens are drawn.
        num_return_sequences: completions of each prompt.
        seed: same seed, prompts and numbers: same completions, whatever the batch size.
        first_request: number of the first completion, which random numbers depend on.
        batch_size: completions decoded together.
        stop: says of the tokens so far after how many of them the completion has ended, None if it goes on.
        stop_steps: tokens after which `stop` is asked again.
        gather: keep the weights ready to be multiplied with meanwhile, which on many devices takes more memory.
        roomy: few programs, for prompts that come one by one: padded to powers of two, the cache whole from the start.

    Raises:
        ConfigError: an argument out of range, or an empty prompt (its row is named).
    """
    limits = [max_new_tokens] * len(prompts) if limits is None else limits
    _check(prompts, limits, max_new_tokens, {"batch_size": batch_size, "num_return_sequences": num_return_sequences})
    if not len(prompts):
        return []
    graphdef, state = nnx.split(model)
    weights, fit = nnx.to_pure_dict(state), room if roomy else bucket
    sizes = cache_lengths(fit(max(map(len, prompts))), max_new_tokens)
    sizes = sizes if model.cache_grows and not roomy else sizes[-1:]
    compiled = [programs(graphdef, max_new_tokens, size, gather) for size in sizes]
    # Prompts of similar length are read together: each costs as much as the longest of them.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    queue = deque(row * num_return_sequences + i for row in order for i in range(num_return_sequences))
    batch = _Batch(compiled, weights, min(power(batch_size), power(len(queue))), fit, stop, stop_steps)
    ends = np.asarray(sorted(set(eos_ids)) or [-1], np.int32)
    completions: list[Completion | None] = [None] * len(queue)
    while queue or batch.active:
        check(weights)
        batch.fill(queue, prompts, limits, num_return_sequences, first_request)
        for request, completion in batch.run(ends, sampling, seed, more=len(queue)):
            completions[request] = completion
    return [completion for completion in completions if completion is not None]


def _check(prompts: Sequence[np.ndarray], limits: Sequence[int], max_new_tokens: int, counts: dict[str, int]) -> None:
    for name, value in {"max_new_tokens": max_new_tokens, **counts}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {row} is empty")
    if len(limits) != len(prompts) or not all(1 <= limit <= max_new_tokens for limit in limits):
        raise ConfigError(f"limits must be {len(prompts)} numbers, one a prompt, from 1 to {max_new_tokens}")


class _Request(NamedTuple):
    """What a slot works at: the number of the completion, and the tokens of prompt and completion so far."""

    number: int
    length: int


class _Batch:
    """Slots, and which request each of them has; `compiled` for caches that have more and more room."""

    def __init__(
        self,
        compiled: list[Programs],
        weights: Any,
        rows: int,
        fit: Callable[[int], int],
        stop: Callable[[list[int]], int | None] | None,
        stop_steps: int,
    ):
        self._compiled, *self._larger = compiled
        self._weights, self._fit = weights, fit
        self._stop, self._steps = stop, LOOK_STEPS if stop is None else stop_steps
        self._near = self._compiled.near(weights)
        self._shrinks = self._compiled.max_new_tokens >= LEAST_TOKENS
        self._slots: Slots = self._compiled.empty(weights, rows)
        self._requests: list[_Request | None] = [None] * rows

    @property
    def active(self) -> int:
        """Slots that are in use."""
        return sum(request is not None for request in self._requests)

    def fill(
        self,
        queue: deque[int],
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        per_prompt: int,
        first_request: int,
    ) -> None:
        """Give free slots the next requests; a few prompts at a time, each as wide as the longest of them."""
        free = deque(slot for slot, request in enumerate(self._requests) if request is None)
        while free and queue:
            begun: dict[int, list[tuple[int, int]]] = {}
            while free and queue and (queue[0] // per_prompt in begun or len(begun) < MOST_PROMPTS):
                request = queue.popleft()
                begun.setdefault(request // per_prompt, []).append((free.popleft(), request))
            self._admit(begun, prompts, limits, first_request)

    def _admit(
        self,
        begun: dict[int, list[tuple[int, int]]],
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        first_request: int,
    ) -> None:
        """Read prompts, and begin their completions in slots: (slot, request) by number of the prompt."""
        each = [
            (slot, source, number, limits[prompt])
            for source, (prompt, pairs) in enumerate(begun.items())
            for slot, number in pairs
        ]
        numbers = np.full((4, power(len(each))), 0, np.int32)
        numbers[0] = len(self._requests)
        numbers[:, : len(each)] = np.transpose(each)
        places, sources, requests, ends = numbers
        tokens, lengths = _pad([prompts[prompt] for prompt in begun], self._fit)
        self._slots = self._compiled.admit(
            self._weights, self._slots, tokens, lengths, places, sources, requests + first_request, ends
        )
        for prompt, pairs in begun.items():
            for slot, request in pairs:
                self._requests[slot] = _Request(request, len(prompts[prompt]))

    def run(self, ends: np.ndarray, sampling: Sampling, seed: int, *, more: int) -> list[tuple[int, Completion]]:
        """Decode until there is something to do for the host; the requests that are finished.

        `more` requests wait for a free slot.
        """
        rows, active = len(self._requests), self.active
        if more:
            wanted = min(more, max(1, rows // REFILL_SHARE))
        else:
            wanted = active - _rung(rows // 2 + 1) if self._shrinks and rows > LEAST_SLOTS else active
        longest = max(request.length for request in self._requests if request is not None)
        if longest == self._compiled.cache_length:
            self._compiled, *self._larger = self._larger
            self._slots = self._compiled.grown(self._slots)
        steps = min(self._compiled.cache_length - longest, self._steps)
        enough = rows - active + max(1, wanted)
        self._slots = self._compiled.decode(*self._near, self._slots, ends, sampling, seed, enough, steps)
        finished = self._collect(set(ends.tolist()))
        if not more and self._shrinks:
            self._shrink()
        return finished

    def _collect(self, ends: set[int]) -> list[tuple[int, Completion]]:
        slots = self._slots
        looked_at = (slots.done, slots.counts, slots.ids, slots.logps, slots.cache.lengths)
        done, counts, ids, logps, lengths = fetch(looked_at)
        finished, stopped = [], np.zeros(len(done), bool)
        for slot, request in enumerate(self._requests):
            if request is None:
                continue
            tokens = ids[slot, : counts[slot]].tolist()
            self._requests[slot] = request._replace(length=int(lengths[slot]))
            kept = None if self._stop is None else self._stop(tokens)
            if kept is None and not done[slot]:
                continue
            stopped[slot] = not done[slot]
            tokens = tokens[:kept]
            ended = kept is not None or tokens[-1] in ends
            finished.append((request.number, Completion(tokens, logps[slot, : len(tokens)].tolist(), ended)))
            self._requests[slot] = None
        if stopped.any():
            self._slots = self._compiled.finish(self._slots, stopped)
        return finished

    def _shrink(self) -> None:
        """Fewer slots, where that is enough for what is left."""
        rows, active = len(self._requests), self.active
        smaller = max(LEAST_SLOTS, _rung(active))
        if not active or smaller >= rows:
            return
        kept = [slot for slot, request in enumerate(self._requests) if request is not None]
        places = np.array(kept + [rows] * (smaller - active), np.int32)
        self._slots = self._compiled.keep(self._slots, places)
        self._requests = [self._requests[slot] for slot in kept] + [None] * (smaller - active)


def cache_lengths(prompt: int, completion: int) -> list[int]:
    """From room for a prompt and a little more to room for all of it, in few steps."""
    size, last = (tokens + -tokens % CACHE_MULTIPLE for tokens in (prompt + CACHE_MULTIPLE, prompt + completion))
    sizes = []
    while size < last:
        sizes.append(size)
        size += size // 2 + -(size // 2) % CACHE_MULTIPLE
    return [*sizes, last]


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 40, ..., 64, 80, ..., 128, 160, ...: few shapes to compile, little padding."""
    step = max(8, power(length) // 8)
    return max(16, length + -length % step)


def room(length: int) -> int:
    """The next power of two from ROOM on."""
    return max(ROOM, power(length))


def _rung(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    above = power(count)
    return above * 3 // 4 if count <= above * 3 // 4 else above


def power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _pad(prompts: Sequence[np.ndarray], fit: Callable[[int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [P, T] and lengths [P]; missing rows are one token long."""
    rows = power(len(prompts))
    tokens, lengths = np.zeros((rows, fit(max(map(len, prompts)))), np.int32), np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths
