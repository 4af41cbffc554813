"""The source of online methods: prompts, completions of the policy, their rewards, and the rows to train on."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from jaxpost import watch
from jaxpost.data.loader import shuffled
from jaxpost.data.prompts import Prompts
from jaxpost.metrics import Greatest, Least, Metric
from jaxpost.processes import own_share
from jaxpost.rl.drawn import Drawn, Sampled, arrays_of, completions_of
from jaxpost.rl.generate import Completion
from jaxpost.rl.plan import GenerationConfig, Plan
from jaxpost.rl.report import Scores, completion_metrics, reward_metrics
from jaxpost.rl.rewards import Rewards
from jaxpost.rl.rows import Answers, deal, rows_of

PHASES = {"generation": "generate", "reward": "score"}  # of the watch, by what the seconds are logged as


class Rollout(NamedTuple):
    """What a step is given.

    Attributes:
        batch: on the devices.
        metrics: of the completions, where they are new.
        times: seconds spent on them, by purpose.
    """

    batch: Any
    metrics: Mapping[str, Metric]
    times: Mapping[str, float]


class Clock:
    """Adds up what is spent, by purpose.

    Attributes:
        seconds: of each purpose.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, purpose: str) -> Iterator[None]:
        """Time the block."""
        began = time.perf_counter()
        with watch.phase(PHASES.get(purpose, "train")):
            yield
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - began


class Rollouts:
    """Batches of completions of the policy that is being trained; what they are depends on seed and step alone.

    Args:
        prompts: to complete.
        plan: the numbers.
        config: of the run.
        complete: (state, prompts, numbers of those to complete, completions of each, number of the first completion)
            -> what was sampled.
        read: completion and its prompt's cell -> what reward functions see of it.
        rewards: the functions.
        weights: of the functions; None for 1.
        appraise: (state, rows of a generation) -> batches of its optimizer steps, and the advantages [B, S].
        record: (step, completions) -> None: keeps them for the user.
        seed: of the order of the prompts.
        branches: the model reads a prompt once for several completions.
        needs_equal_rewards: completions are learned from where all of a prompt are rewarded alike; if not, their tokens
            are left out.
        start: the first step.
        end: the step before which to stop.
        kept: what `kept` gave after the step before; empty where a generation begins.

    Attributes:
        ahead: False, since the policy has to have taken the step before.
    """

    ahead = False

    def __init__(
        self,
        prompts: Prompts,
        plan: Plan,
        config: GenerationConfig,
        *,
        complete: Callable[[Any, Prompts, Sequence[int], int, int], Sampled],
        read: Callable[[Completion, Any], Any],
        rewards: Rewards,
        weights: Sequence[float] | None,
        appraise: Callable[[Any, dict[str, np.ndarray]], tuple[list[Any], np.ndarray]],
        record: Callable[[int, Answers, np.ndarray], None],
        seed: int,
        branches: bool,
        needs_equal_rewards: bool = True,
        start: int = 0,
        end: int = 0,
        kept: Sequence[Any] = (),
    ):
        self.prompts, self.plan, self.config = prompts, plan, config
        self._complete, self._read, self._rewards = complete, read, rewards
        self._appraise, self._record, self._weights = appraise, record, weights
        self._seed, self._branches, self._next = seed, branches, start
        self._needs_equal_rewards = needs_equal_rewards
        self._order = functools.lru_cache(maxsize=2)(functools.partial(shuffled, len(prompts.tokens), seed))
        self._end, self._drawn = end, None
        self._scoring = ThreadPoolExecutor(1)  # one call at a time, in order
        self._batches: list[Any] = list(kept)
        if self._batches and "lengths" in self._batches[-1]:
            self._drawn = self._restored(self._batches.pop())

    def __call__(self, state: Any) -> Rollout:
        """The batch of the next step; generates where a generation begins."""
        step = self._next
        generation, rest = divmod(step, self.plan.num_steps)
        clock, metrics = Clock(), {}
        if rest == 0:
            is_last = (generation + 1) * self.plan.num_steps >= self._end
            with clock("generation"):
                drawn = self._drawn or self._draw_generation(state, generation)
                ahead = self.config.is_ahead and not is_last
                drawn_ahead = self._draw_generation(state, generation + 1) if ahead else None
            self._batches, metrics = self._learn(state, drawn, generation, step, clock)
            self._drawn = drawn_ahead
        self._next = step + 1  # only now: what is interrupted before is done again
        return Rollout(self._batches[rest % self.plan.num_parts], metrics, clock.seconds)

    def kept(self) -> list[Any]:
        """What cannot be made again: the rest of a generation that was begun, and one that was sampled ahead."""
        batches = self._batches if self._next % self.plan.num_steps else []
        return batches if self._drawn is None else [*batches, arrays_of(self._drawn.sampled.completions)]

    def evaluate(self, state: Any, prompts: Prompts, per_prompt: int) -> dict[str, float]:
        """Rewards of completions of other prompts."""
        drawn = self._draw(state, prompts, list(range(len(prompts.tokens))), per_prompt, 0)
        answers = drawn.answers(self._rewards)
        metrics = completion_metrics(answers.completions) | reward_metrics(self._scores(answers, per_prompt))
        return {name: _value(metric) for name, metric in metrics.items()}

    def _draw_generation(self, state: Any, generation: int) -> Drawn:
        return self._draw(
            state, self.prompts, self._numbers(generation), self.plan.num_generations, self._first(generation)
        )

    def _numbers(self, generation: int) -> list[int]:
        """Of the prompts of a generation."""
        return [self._prompt(generation * self.plan.num_prompts + i) for i in range(self.plan.num_prompts)]

    def _first(self, generation: int) -> int:
        """Number of its first completion."""
        return generation * self.plan.num_completions * (1 + self.config.max_resamplings)

    def _learn(
        self, state: Any, drawn: Drawn, generation: int, step: int, clock: Clock
    ) -> tuple[list[Any], dict[str, Metric]]:
        """The batches of a generation, and metrics of its completions."""
        with clock("reward"):
            answers = drawn.answers(self._rewards)
        if self.config.dynamic_sampling:
            answers = self._resampled(state, answers, generation, clock)
        with clock("appraise"):
            dull = [] if self._needs_equal_rewards else self._dull(answers)
            lengths = [len(completion.tokens) for completion in answers.completions]
            read = [i // self.plan.num_generations not in dull for i in range(len(lengths))]
            rows = deal([length * is_read for length, is_read in zip(lengths, read, strict=True)], self.plan)
            options = {"group_size": self.plan.num_generations, "branches": self._branches}
            batches, advantages = self._appraise(state, rows_of(answers, rows, read, **options))
            ordered = np.zeros(len(answers.completions), np.float32)
            for row, members in enumerate(rows):
                ordered[members] = advantages[row, : len(members)]
        self._record(step, answers, ordered)
        scores = self._scores(answers, self.plan.num_generations)
        return batches, completion_metrics(answers.completions) | reward_metrics(scores)

    def _scores(self, answers: Answers, per_prompt: int) -> Scores:
        return Scores(self._rewards.names, answers.scored, per_prompt, self._weights)

    def _prompt(self, place: int) -> int:
        """Number of the prompt at a place of the endless order."""
        epoch, index = divmod(place, len(self.prompts.tokens))
        return int(self._order(epoch)[index]) if self.config.shuffle_dataset else index

    def _draw(self, state: Any, prompts: Prompts, numbers: Sequence[int], per_prompt: int, first: int) -> Drawn:
        """Completions of these prompts, whose rewards are being computed."""
        sampled = self._complete(state, prompts, numbers, per_prompt, first)
        return self._given(prompts, numbers, per_prompt, sampled)

    def _restored(self, arrays: Mapping[str, Any]) -> Drawn:
        """The generation that was sampled ahead of the one that a checkpoint is in."""
        numbers = self._numbers(-(-self._next // self.plan.num_steps))
        ids = [self.prompts.tokens[i] for i in numbers for _ in range(self.plan.num_generations)]
        sampled = Sampled(ids, completions_of(arrays), {})
        return self._given(self.prompts, numbers, self.plan.num_generations, sampled)

    def _given(self, prompts: Prompts, numbers: Sequence[int], per_prompt: int, sampled: Sampled) -> Drawn:
        """Completions, of which the reward functions are given this process's share."""
        completions, share = sampled.completions, own_share(len(numbers))
        here = slice(share.start * per_prompt, share.stop * per_prompt)
        each = [i for i in numbers for _ in range(per_prompt)]
        columns = {name: [cells[i] for i in each] for name, cells in prompts.columns.items()}
        asked = columns.pop("prompt")
        texts = [self._read(completion, prompt) for completion, prompt in zip(completions, asked, strict=True)]
        arguments = {
            **columns,
            **sampled.columns,
            "prompts": asked,
            "completions": texts,
            "completion_ids": [completion.tokens for completion in completions],
        }
        arguments = {name: values[here] for name, values in arguments.items()}
        scored = self._scoring.submit(self._rewards, arguments, here.stop - here.start)
        return Drawn(each, [prompts.rows[i] for i in each], sampled, texts, scored)

    def _resampled(self, state: Any, answers: Answers, generation: int, clock: Clock) -> Answers:
        """Other prompts where rewards do not differ, as long as there are such and tries are left.

        Yu et al., 2025, "DAPO", arXiv:2503.14476, equation 11.
        """
        rng = np.random.default_rng([self._seed, generation])
        for attempt in range(1, self.config.max_resamplings + 1):
            dull = self._dull(answers)
            if not dull:
                break
            numbers = rng.integers(len(self.prompts.tokens), size=len(dull)).tolist()
            begin = self._first(generation) + attempt * self.plan.num_completions
            with clock("generation"):
                drawn = self._draw(state, self.prompts, numbers, self.plan.num_generations, begin)
            with clock("reward"):
                others = drawn.answers(self._rewards)
            better = [i for i in range(len(dull)) if i not in self._dull(others)]
            places = dict(zip(dull, better, strict=False))
            answers = answers.replaced(places, others, self.plan.num_generations)
        return answers

    def _dull(self, answers: Answers) -> list[int]:
        """Groups whose completions are all rewarded alike."""
        values = self._scores(answers, self.plan.num_generations).summed.reshape(-1, self.plan.num_generations)
        return [i for i, group in enumerate(values) if len(set(group[~np.isnan(group)].tolist())) < 2]


def _value(metric: Metric) -> float:
    return float(metric[0]) if isinstance(metric, Least | Greatest) else float(metric.value())
