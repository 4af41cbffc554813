"""Preference pairs of word problems: the right solution, and one that is subtly wrong (hard) or absurd (easy).

A hard one is worked like the right one but for one fault, with which it goes on: a slip in a result, a quantity that is
misread, a wrong operation, or a last step that is left out. An easy one is the solution of another problem, or has
results that follow from nothing. Equal seeds give equal bytes, as in `word_problems`.

    python -m jaxpost.data.word_problem_pairs --output_dir data/word_problem_pairs
"""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jaxpost.data.word_problems import (
    EQUATION,
    NoNaturalNumber,
    Problem,
    Template,
    below,
    last_name,
    load_templates,
    main,
    pick,
    problems,
    said,
    solve,
    split,
    write_files,
)

KINDS = ("hard", "easy")
SLIPS = (-10, -2, -1, 1, 2, 10)
SWAPS = {"+": "-", "-": "+", "*": "+", "/": "*"}
Solution = tuple[list[str], int]  # its steps, and its answer


def generate_pairs(num_rows: int = 2000, seed: int = 0) -> list[dict]:
    """Return `num_rows` rows `{"prompt", "chosen", "rejected", "answer", "kind"}`, hard and easy ones in turn.

    The first rows do not depend on `num_rows`, and no row has anything of a later one.

    Raises:
        ConfigError: as `word_problems.generate`.
    """
    rng = random.Random(2**32 + seed)  # a stream of its own; `problems` refuses a seed that is too small
    rows, earlier = [], []
    for i, problem in enumerate(problems(num_rows, seed)):
        kind = KINDS[i % len(KINDS)]
        wrong = subtly_wrong(rng, problem) if kind == "hard" else absurd(rng, problem, earlier)
        row = problem.as_row()
        rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": said(*wrong)})
        rows[-1] |= {"answer": row["answer"], "kind": kind}
        earlier = [*earlier[-3:], problem]
    return rows


def write_pairs(output_dir: str | Path, num_rows: int = 2000, seed: int = 0) -> dict[str, int]:
    """Write `train.jsonl`, `test.jsonl`, and the latter's rows by kind as `hard.jsonl` and `easy.jsonl`.

    Raises:
        ConfigError: as `word_problems.write`.
    """
    train, test = split(generate_pairs(num_rows, seed))
    by_kind = {kind: [row for row in test if row["kind"] == kind] for kind in KINDS}
    return write_files(output_dir, {"train": train, "test": test, **by_kind})


def subtly_wrong(rng: random.Random, problem: Problem) -> Solution:
    """Return a solution with one fault, whose numbers are whole and not negative and whose answer is another."""
    template = next(template for template in load_templates() if template.name == problem.template)
    while True:
        fault = pick(rng, FAULTS)
        try:
            found = fault(rng, problem, template)
        except NoNaturalNumber:
            continue
        if found is not None and found[1] != problem.answer:
            return found


def slip(rng: random.Random, problem: Problem, template: Template) -> Solution:
    """A result that is a little off, or has two digits the wrong way round."""
    _, right = solve(template.steps, problem.quantities, problem.words)
    name = pick(rng, [name for name, _ in equations(template.steps)])
    swapped = int(str(right[name])[:-2] + str(right[name])[-2:][::-1])
    wrong = pick(rng, [right[name] + by for by in SLIPS] + [swapped])
    if wrong < 0 or wrong == right[name]:
        raise NoNaturalNumber(name)
    return worked(template.steps, problem.quantities, problem.words, {name: wrong})


def misread(rng: random.Random, problem: Problem, template: Template) -> Solution:
    """A quantity of the question taken for another."""
    used = {word for _, formula in equations(template.steps) for word in formula.split() if word in problem.quantities}
    name = pick(rng, sorted(used))
    wrong = problem.quantities[name] + pick(rng, SLIPS)
    if wrong < 2:
        raise NoNaturalNumber(name)
    return worked(template.steps, {**problem.quantities, name: wrong}, problem.words)


def wrong_operation(rng: random.Random, problem: Problem, template: Template) -> Solution | None:
    """One operation taken for another."""
    places = [(i, j) for i, step in enumerate(template.steps) for j, mark in enumerate(step) if _is_operator(step, j)]
    if not places:
        return None
    i, j = pick(rng, places)
    steps = list(template.steps)
    steps[i] = steps[i][:j] + SWAPS[steps[i][j]] + steps[i][j + 1 :]
    return worked(steps, problem.quantities, problem.words)


def last_step_left_out(rng: random.Random, problem: Problem, template: Template) -> Solution | None:
    """What was found last but one, taken for the answer."""
    if len(template.steps) < 2 or not EQUATION.search(template.steps[-2]):
        return None
    return worked(template.steps[:-1], problem.quantities, problem.words)


FAULTS: tuple[Callable[[random.Random, Problem, Template], Solution | None], ...] = (
    slip,
    misread,
    wrong_operation,
    last_step_left_out,
)


def absurd(rng: random.Random, problem: Problem, earlier: Sequence[Problem]) -> Solution:
    """Return the solution of an earlier problem of another kind, or this one with results that follow from nothing."""
    others = [other for other in earlier if other.template != problem.template and other.answer != problem.answer]
    if others and rng.random() < 0.5:
        return list(others[-1].steps), others[-1].answer
    template = next(template for template in load_templates() if template.name == problem.template)
    wild = {name: problem.answer + 1000 + below(rng, 99_000) for name, _ in equations(template.steps)}
    return worked(template.steps, problem.quantities, problem.words, wild)


def worked(
    steps: Sequence[str],
    quantities: Mapping[str, int],
    words: Mapping[str, str],
    slips: Mapping[str, int] | None = None,
) -> Solution:
    """Return steps with their numbers, and the last of these; arguments and errors are those of `solve`."""
    told, values = solve(steps, quantities, words, slips)
    return told, values[last_name(steps)]


def equations(steps: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the formula of every equation."""
    return (found for step in steps for found in EQUATION.findall(step))


def _is_operator(step: str, place: int) -> bool:
    """Whether there is an operator in an equation, between spaces, at that place of a step."""
    inside = any(match.start() < place < match.end() for match in EQUATION.finditer(step))
    return inside and step[place] in SWAPS and step[place - 1] == step[place + 1] == " "


if __name__ == "__main__":
    sys.exit(main(write=write_pairs))
