"""The source of online methods: prompts, completions of the policy, their rewards, and the rows to train on."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.examples import Example
from jaxpost.data.loader import collate, shuffled
from jaxpost.data.prompts import Prompts
from jaxpost.metrics import Greatest, Least, Metric
from jaxpost.rl.generate import Completion, bucket
from jaxpost.rl.plan import GenerationConfig, Plan
from jaxpost.rl.report import Scores, completion_metrics, reward_metrics
from jaxpost.rl.rewards import Rewards, Scored

LEAST_LENGTH = 64  # tokens of a row
NOTHING = Example(np.zeros(0, np.int32), np.zeros(0, bool))  # of a completion that is not read


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


class Answers(NamedTuple):
    """Completions of one generation, those of a prompt one after the other.

    Attributes:
        prompts: number of each one's prompt.
        completions: of the policy.
        texts: as reward functions see them.
        scored: what those say.
    """

    prompts: list[int]
    completions: list[Completion]
    texts: list[Any]
    scored: Scored


class Rollouts:
    """Batches of completions of the policy that is being trained; what they are depends on seed and step alone.

    Args:
        prompts: to complete.
        plan: the numbers.
        config: of the run.
        complete: (state, prompts, number of completions of each, number of the first) -> completions.
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
        complete: Callable[[Any, list[np.ndarray], int, int], list[Completion]],
        read: Callable[[Completion, Any], Any],
        rewards: Rewards,
        weights: Sequence[float] | None,
        appraise: Callable[[Any, dict[str, np.ndarray]], tuple[list[Any], np.ndarray]],
        record: Callable[[int, "Answers", np.ndarray], None],
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
        batches, advantages = self._appraise(state, self._rows(answers, rows, read))
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
        completions = self._complete(state, [prompts.tokens[i] for i in numbers], per_prompt, first)
        done = time.perf_counter()
        each = [i for i in numbers for _ in range(per_prompt)]
        columns = {name: [cells[i] for i in each] for name, cells in prompts.columns.items()}
        asked = columns.pop("prompt")
        texts = [self._read(completion, prompt) for completion, prompt in zip(completions, asked, strict=True)]
        arguments = {
            **columns,
            "prompts": asked,
            "completions": texts,
            "completion_ids": [completion.tokens for completion in completions],
        }
        scored = self._rewards(arguments, [prompts.rows[i] for i in each])
        times = {"generation": done - began, "reward": time.perf_counter() - done}
        return Answers(each, completions, texts, scored), times

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
            answers = self._replaced(answers, dict(zip(dull, better, strict=False)), others)
        return answers, spent

    def _dull(self, answers: Answers) -> list[int]:
        """Groups whose completions are all rewarded alike."""
        values = self._scores(answers, self.plan.num_generations).summed.reshape(-1, self.plan.num_generations)
        return [i for i, group in enumerate(values) if len(set(group[~np.isnan(group)].tolist())) < 2]

    def _replaced(self, answers: Answers, places: Mapping[int, int], others: Answers) -> Answers:
        """Groups of other answers in the places of some of these."""
        size = self.plan.num_generations
        index = np.arange(len(answers.completions))
        for place, other in places.items():
            index[place * size : (place + 1) * size] = len(index) + other * size + np.arange(size)

        def pick(own: Sequence[Any], new: Sequence[Any]) -> list[Any]:
            both = [*own, *new]
            return [both[i] for i in index]

        scored = answers.scored._replace(
            rewards=np.concatenate([answers.scored.rewards, others.scored.rewards])[index],
            failed=np.concatenate([answers.scored.failed, others.scored.failed])[index],
        )
        return Answers(
            pick(answers.prompts, others.prompts),
            pick(answers.completions, others.completions),
            pick(answers.texts, others.texts),
            scored,
        )

    def _rows(self, answers: Answers, rows: Sequence[Sequence[int]], read: Sequence[bool]) -> dict[str, np.ndarray]:
        """The rows of a generation: [B, T] of the tokens that are `read`, and [B, S] of all completions."""
        examples = [
            [self._example(answers, members, i) if read[number] else NOTHING for i, number in enumerate(members)]
            for members in rows
        ]
        longest = max(sum(len(example.tokens) for example in row) for row in examples)
        batch = collate(examples, max(LEAST_LENGTH, bucket(longest)), pad_id=0)
        size = self.plan.num_generations
        members = np.array(rows)
        sampled = np.zeros(batch["tokens"].shape, np.float32)
        for row, (numbers, parts) in enumerate(zip(rows, examples, strict=True)):
            ends = np.cumsum([len(part.tokens) for part in parts])
            for end, number in zip(ends, numbers, strict=True):
                logps = answers.completions[number].logps if read[number] else []
                sampled[row, end - len(logps) - 1 : end - 1] = logps
        ended = np.array([completion.ended for completion in answers.completions], np.float32)
        lengths = np.array([len(completion.tokens) for completion in answers.completions], np.float32)
        return {
            **batch,
            "examples": np.ones(members.shape, np.float32),
            "groups": (members // size).astype(np.int32),
            "rewards": answers.scored.rewards[members],
            "ended": ended[members],
            "num_trained": lengths[members],
            "sampled_logps": sampled,
        }

    def _example(self, answers: Answers, members: Sequence[int], i: int) -> Example:
        """A completion with its prompt, or as a branch of the first one of the same prompt in the row."""
        prompt, completion = self.prompts.tokens[answers.prompts[members[i]]], answers.completions[members[i]].tokens
        size = self.plan.num_generations
        follows = i > 0 and members[i] // size == members[i - 1] // size
        start = len(prompt) - 1 if self._branches and follows else 0
        tokens = np.concatenate([prompt[start:], completion]).astype(np.int32)
        return Example(tokens, np.arange(len(tokens)) >= len(prompt) - start, 0.0, start)


def deal(lengths: Sequence[int], plan: Plan) -> list[list[int]]:
    """Which completions stand in each row of a generation; all rows have as many, and about as many tokens.

    Completions of a prompt stay together where a row has room for them. Longest first, in turns from the first row to
    the last and back.
    """
    block = int(np.gcd(plan.num_generations, plan.row_size))
    blocks = np.arange(len(lengths)).reshape(-1, block)
    sizes = np.array([sum(lengths[i] for i in members) for members in blocks])
    num_rows = len(lengths) // plan.row_size
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for turn, number in enumerate(np.argsort(-sizes, kind="stable")):
        lap, place = divmod(turn, num_rows)
        rows[place if lap % 2 == 0 else num_rows - 1 - place].append(int(number))
    return [[int(i) for number in sorted(row) for i in blocks[number]] for row in rows]


def _value(metric: Metric) -> float:
    return float(metric[0]) if isinstance(metric, Least | Greatest) else float(metric.value())
