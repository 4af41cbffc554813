"""Completions on their way: what was sampled, what a checkpoint keeps of it, and rewards that are being computed.

Every process scores its own share of them, whole groups of a prompt's, and all are told what the others have found.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import numpy as np

from jaxpost.errors import PreemptedError
from jaxpost.processes import all_agree, fetch, gathered, told_to_stop
from jaxpost.rl.generate import Completion
from jaxpost.rl.rewards import Rewards, Scored
from jaxpost.rl.rows import Answers

LOOK_SECONDS = 0.5


class Sampled(NamedTuple):
    """Completions of some prompts, those of a prompt one after the other.

    Attributes:
        prompt_ids: tokens that each one follows.
        completions: of the policy.
        columns: a list each that reward functions are given beside those of the dataset.
    """

    prompt_ids: list[np.ndarray]
    completions: list[Completion]
    columns: Mapping[str, list[Any]]


class Drawn(NamedTuple):
    """Completions whose rewards are being computed.

    Attributes:
        numbers: of the prompts, one a completion.
        rows: likewise, of the prompts' rows in the dataset.
        sampled: the completions.
        texts: as reward functions see them.
        scored: what those will say of this process's share.
    """

    numbers: list[int]
    rows: list[int]
    sampled: Sampled
    texts: list[Any]
    scored: Future[Scored]

    def answers(self, rewards: Rewards) -> Answers:
        """With what those functions say of all of them, which is waited for.

        Raises:
            RewardError: a function fails too often.
            PreemptedError: the run has been told to stop.
        """
        while not all_agree(bool(wait([self.scored], timeout=LOOK_SECONDS).done)):
            if told_to_stop():
                raise PreemptedError("told to stop")
        scored = Scored.joined(gathered(self.scored.result()))
        rewards.check(scored, self.rows)
        return Answers(self.numbers, self.sampled.prompt_ids, self.sampled.completions, self.texts, scored)


def arrays_of(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    """Completions as a checkpoint keeps them, [N] and [N, T]."""
    lengths = np.array([len(completion.tokens) for completion in completions], np.int32)
    tokens = np.zeros((len(lengths), lengths.max()), np.int32)
    logps = np.zeros(tokens.shape, np.float32)
    for row, completion in enumerate(completions):
        tokens[row, : lengths[row]], logps[row, : lengths[row]] = completion.tokens, completion.logps
    ended = np.array([completion.ended for completion in completions], np.float32)
    return {"tokens": tokens, "logps": logps, "lengths": lengths, "ended": ended}


def completions_of(arrays: Mapping[str, Any]) -> list[Completion]:
    """The same completions again."""
    tokens, logps, lengths, ended = fetch([arrays[name] for name in ("tokens", "logps", "lengths", "ended")])
    return [
        Completion(tokens[row, :length].tolist(), logps[row, :length].tolist(), bool(ended[row]))
        for row, length in enumerate(lengths.tolist())
    ]
