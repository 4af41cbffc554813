"""The rows of a generation: which completions stand in each, and the columns that an objective is given of them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.examples import Example, common_prefix
from jaxpost.data.loader import collate
from jaxpost.rl.generate import Completion, bucket
from jaxpost.rl.plan import Plan
from jaxpost.rl.rewards import Scored

LEAST_LENGTH = 64  # tokens of a row
GRAIN = 4  # sums that XLA on CPU adds keys up in, by their place in the row
NOTHING = Example(np.zeros(0, np.int32), np.zeros(0, bool))  # of a completion that is not read


class Answers(NamedTuple):
    """Completions of one generation, those of a prompt one after the other.

    Attributes:
        prompts: number of each one's prompt in the dataset.
        prompt_ids: tokens that each one follows.
        completions: of the policy.
        texts: as reward functions see them.
        scored: what those say.
    """

    prompts: list[int]
    prompt_ids: list[np.ndarray]
    completions: list[Completion]
    texts: list[Any]
    scored: Scored

    def replaced(self, places: dict[int, int], others: "Answers", size: int) -> "Answers":
        """Groups of `size` other answers in the places of some of these: the other's number by this one's."""
        index = np.arange(len(self.completions))
        for place, other in places.items():
            index[place * size : (place + 1) * size] = len(index) + other * size + np.arange(size)

        def pick(own: Sequence[Any], new: Sequence[Any]) -> list[Any]:
            both = [*own, *new]
            return [both[i] for i in index]

        scored = self.scored._replace(
            rewards=np.concatenate([self.scored.rewards, others.scored.rewards])[index],
            failed=np.concatenate([self.scored.failed, others.scored.failed])[index],
        )
        return Answers(
            pick(self.prompts, others.prompts),
            pick(self.prompt_ids, others.prompt_ids),
            pick(self.completions, others.completions),
            pick(self.texts, others.texts),
            scored,
        )


def rows_of(
    answers: Answers, rows: Sequence[Sequence[int]], read: Sequence[bool], *, group_size: int, branches: bool
) -> dict[str, np.ndarray]:
    """The columns: [B, T] of the tokens that are read, and [B, S] of all completions.

    Args:
        answers: N completions.
        rows: numbers of the S completions of each row.
        read: whether the tokens of each completion stand in its row.
        group_size: completions of a prompt.
        branches: completions of a row share what their prompts begin with, all of it or a system prompt.
    """
    examples = [_examples(answers, members, read, branches) for members in rows]
    longest = max(sum(len(example.tokens) for example in row) for row in examples)
    batch = collate(examples, max(LEAST_LENGTH, bucket(longest)), pad_id=0)
    members = np.array(rows)
    sampled = np.zeros(batch["tokens"].shape, np.float32)
    for row, (numbers, parts) in enumerate(zip(rows, examples, strict=True)):
        begins = np.cumsum([0, *(len(part.tokens) for part in parts)])
        for begin, number, part in zip(begins[:-1], numbers, parts, strict=True):
            if read[number]:
                first = begin + len(answers.prompt_ids[number]) - part.start - 1
                logps = answers.completions[number].logps
                sampled[row, first : first + len(logps)] = logps
    ended = np.array([completion.ended for completion in answers.completions], np.float32)
    trained = np.array([completion.num_own for completion in answers.completions], np.float32)
    return {
        **batch,
        "examples": np.ones(members.shape, np.float32),
        "groups": (members // group_size).astype(np.int32),
        "rewards": answers.scored.rewards[members],
        "ended": ended[members],
        "num_trained": trained[members],
        "sampled_logps": sampled,
    }


def _examples(answers: Answers, members: Sequence[int], read: Sequence[bool], branches: bool) -> list[Example]:
    """The completions of a row with their prompts, or as branches of the last that is there with its whole prompt.

    Tokens stand as many places after a multiple of GRAIN as in their document. Their keys are then summed in the order
    of the sampler, which makes what it says and what training says of a token the same to the bit, as far as products
    and attention are.
    """
    examples, trunk = [], np.zeros(0, np.int32)
    alike = Counter(answers.prompt_ids[number].tobytes() for number in members if read[number])  # still to come
    for number in members:
        prompt, completion = answers.prompt_ids[number], answers.completions[number]
        if not read[number]:
            examples.append(NOTHING)
            continue
        # A branch has the last token of its prompt, to predict the completion from.
        start = min(common_prefix(trunk, prompt), len(prompt) - 1) if branches else 0
        begin = sum(len(example.tokens) for example in examples)
        start = max(0, start - (start - begin) % GRAIN)
        left = alike[prompt.tobytes()]
        # Without a branch, or where there are as many tokens with a trunk of their own.
        if not start or left * (len(prompt) - start) >= len(prompt) + left - 1:
            start, trunk = 0, prompt
            if gap := -begin % GRAIN:
                examples[-1] = _longer(examples[-1], gap)
        alike[prompt.tobytes()] -= 1
        tokens = np.concatenate([prompt[start:], completion.tokens]).astype(np.int32)
        context = np.zeros(len(prompt) - start, bool)
        examples.append(Example(tokens, np.concatenate([context, completion.is_own]), 0.0, start))
    return examples


def _longer(example: Example, more: int) -> Example:
    """With so many tokens after it that nobody reads."""
    tokens, loss_mask = (np.pad(x, (0, more)) for x in (example.tokens, example.loss_mask))
    return example._replace(tokens=tokens, loss_mask=loss_mask)


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
