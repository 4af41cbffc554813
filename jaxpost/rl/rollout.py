"""The source of online methods: prompts, completions of the policy, their rewards, and the rows to train on."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.loader import shuffled
from jaxpost.data.prompts import Prompts
from jaxpost.metrics import Greatest, Least, Metric
from jaxpost.rl.generate import Completion
from jaxpost.rl.plan import GenerationConfig, Plan
from jaxpost.rl.report import Scores, completion_metrics, reward_metrics
from jaxpost.rl.rewards import Rewards
from jaxpost.rl.rows import Answers, deal, rows_of


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
        kept: Sequence[Any] = (),
    ):
        self.prompts, self.plan, self.config = prompts, plan, config
        self._complete, self._read, self._rewards = complete, read, rewards
        self._appraise, self._record, self._weights = appraise, record, weights
        self._seed, self._branches, self._next = seed, branches, start
        self._needs_equal_rewards = needs_equal_rewards
        self._order = functools.lru_cache(maxsize=2)(functools.partial(shuffled, len(prompts.tokens), seed))
        self._batches: list[Any] = list(kept)

    def __call__(self, state: Any) -> Rollout:
        """The batch of the next step; generates where a generation begins."""
        step, self._next = self._next, self._next + 1
        generation, rest = divmod(step, self.plan.num_steps)
        metrics, times = {}, {}
        if rest == 0:
            self._batches, metrics, times = self._generate(state, generation, step)
        return Rollout(self._batches[rest % self.plan.num_parts], metrics, times)

    def kept(self) -> list[Any]:
        """The batches of the generation that the next step goes on with; none where it begins with a new one."""
        return self._batches if self._next % self.plan.num_steps else []

    def evaluate(self, state: Any, prompts: Prompts, per_prompt: int) -> dict[str, float]:
        """Rewards of completions of other prompts."""
        answers, _ = self._answer(state, prompts, list(range(len(prompts.tokens))), per_prompt, 0)
        metrics = completion_metrics(answers.completions) | reward_metrics(self._scores(answers, per_prompt))
        return {name: _value(metric) for name, metric in metrics.items()}

    def _generate(
        self, state: Any, generation: int, step: int
    ) -> tuple[list[Any], dict[str, Metric], dict[str, float]]:
        numbers = [self._prompt(generation * self.plan.num_prompts + i) for i in range(self.plan.num_prompts)]
        first = generation * self.plan.num_completions * (1 + self.config.max_resamplings)
        answers, times = self._answer(state, self.prompts, numbers, self.plan.num_generations, first)
        if self.config.dynamic_sampling:
            answers, more = self._resampled(state, answers, generation, first)
            times = {name: seconds + more.get(name, 0.0) for name, seconds in times.items()}
        began = time.perf_counter()
        dull = [] if self._needs_equal_rewards else self._dull(answers)
        lengths = [len(completion.tokens) for completion in answers.completions]
        read = [i // self.plan.num_generations not in dull for i in range(len(lengths))]
        rows = deal([length * is_read for length, is_read in zip(lengths, read, strict=True)], self.plan)
        options = {"group_size": self.plan.num_generations, "branches": self._branches}
        columns = rows_of(answers, rows, read, **options)
        batches, advantages = self._appraise(state, columns)
        ordered = np.zeros(len(answers.completions), np.float32)
        for row, members in enumerate(rows):
            ordered[members] = advantages[row, : len(members)]
        times["appraise"] = time.perf_counter() - began
        self._record(step, answers, ordered)
        metrics = completion_metrics(answers.completions) | reward_metrics(
            self._scores(answers, self.plan.num_generations)
        )
        return batches, metrics, times

    def _scores(self, answers: Answers, per_prompt: int) -> Scores:
        return Scores(self._rewards.names, answers.scored, per_prompt, self._weights)

    def _prompt(self, place: int) -> int:
        """Number of the prompt at a place of the endless order."""
        epoch, index = divmod(place, len(self.prompts.tokens))
        return int(self._order(epoch)[index]) if self.config.shuffle_dataset else index

    def _answer(
        self, state: Any, prompts: Prompts, numbers: Sequence[int], per_prompt: int, first: int
    ) -> tuple[Answers, dict[str, float]]:
        """Completions of these prompts and their rewards; and the seconds that either took."""
        began = time.perf_counter()
        sampled = self._complete(state, prompts, numbers, per_prompt, first)
        completions = sampled.completions
        done = time.perf_counter()
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
        scored = self._rewards(arguments, [prompts.rows[i] for i in each])
        times = {"generation": done - began, "reward": time.perf_counter() - done}
        return Answers(each, sampled.prompt_ids, completions, texts, scored), times

    def _resampled(self, state: Any, answers: Answers, generation: int, first: int) -> tuple[Answers, dict[str, float]]:
        """Other prompts where rewards do not differ, as long as there are such and tries are left.

        Yu et al., 2025, "DAPO", arXiv:2503.14476, equation 11.
        """
        spent: dict[str, float] = {}
        rng = np.random.default_rng([self._seed, generation])
        for attempt in range(1, self.config.max_resamplings + 1):
            dull = self._dull(answers)
            if not dull:
                break
            numbers = rng.integers(len(self.prompts.tokens), size=len(dull)).tolist()
            begin = first + attempt * self.plan.num_completions
            others, times = self._answer(state, self.prompts, numbers, self.plan.num_generations, begin)
            spent = {name: seconds + spent.get(name, 0.0) for name, seconds in times.items()}
            better = [i for i in range(len(dull)) if i not in self._dull(others)]
            places = dict(zip(dull, better, strict=False))
            answers = answers.replaced(places, others, self.plan.num_generations)
        return answers, spent

    def _dull(self, answers: Answers) -> list[int]:
        """Groups whose completions are all rewarded alike."""
        values = self._scores(answers, self.plan.num_generations).summed.reshape(-1, self.plan.num_generations)
        return [i for i, group in enumerate(values) if len(set(group[~np.isnan(group)].tolist())) < 2]


def _value(metric: Metric) -> float:
    return float(metric[0]) if isinstance(metric, Least | Greatest) else float(metric.value())
