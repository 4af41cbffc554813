"""Arithmetic word problems with worked solutions, made by the project itself and correct by construction.

A template's quantities are drawn so that every number is a whole one of natural size; the steps of its solution are
formulas over these quantities, evaluated here and rendered with their results. Equal seeds give equal bytes on every
Python version and platform: all chance comes from `random.Random(seed).random()`, the one method whose sequence
Python promises to keep. Rows of two seeds are not kept apart: hold out rows with `split`, not with another seed.

    python -m jaxpost.data.word_problems --output_dir data/word_problems
"""

import argparse
import ast
import functools
import itertools
import json
import math
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jaxpost.data.word_problem_templates import TEMPLATES, WORDS
from jaxpost.errors import ConfigError
from jaxpost.writing import replace_file

MIN_ROWS = 20


class NoNaturalNumber(ValueError):
    """A formula has no whole result of 0 or more; in a right solution that is a fault of the template."""


def divide_exactly(dividend: int, divisor: int) -> int:
    """Return the quotient, where there is no remainder."""
    if divisor == 0 or dividend % divisor:
        raise NoNaturalNumber(f"{dividend} / {divisor}")
    return dividend // divisor


OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: divide_exactly,
}
EQUATION = re.compile(r"\[([a-z]+) = ([^]]+)\]")
Choice = TypeVar("Choice")


@dataclass(frozen=True, kw_only=True)
class Template:
    """One kind of problem: `drawn` are its free quantities, `computed` the formulas of the others, in order."""

    name: str
    drawn: Mapping[str, Sequence[int]]
    computed: Mapping[str, str]
    stories: Sequence[str]
    questions: Sequence[str]
    steps: Sequence[str]

    @property
    def capacity(self) -> int:
        """The number of different problems, not counting wordings and names."""
        return math.prod(len(choices) for choices in self.drawn.values())


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A rendered template; no two problems of one `draw_problems` agree in `template` and `quantities`.

    Its question tells `quantities`, drawn ones and computed ones; `words` fill its gaps.
    """

    template: str
    quantities: Mapping[str, int]
    words: Mapping[str, str]
    question: str
    steps: Sequence[str]
    answer: int

    def as_row(self) -> dict:
        """Return the conversational prompt-completion row; the completion ends in `#### answer`."""
        return {
            "prompt": [{"role": "user", "content": self.question}],
            "completion": said(self.steps, self.answer),
            "answer": str(self.answer),
        }


def said(steps: Sequence[str], answer: int) -> list[dict]:
    """Return a worked solution as the assistant's message."""
    return [{"role": "assistant", "content": "\n".join([*steps, f"#### {answer}"])}]


def generate(num_rows: int = 2000, seed: int = 0) -> list[dict]:
    """Return `num_rows` different problems as rows `{"prompt", "completion", "answer"}`, all templates evenly mixed.

    The first rows do not depend on `num_rows`.

    Raises:
        ConfigError: `num_rows` is below 20 or above the number of distinct problems; `seed` is negative.
    """
    return [problem.as_row() for problem in problems(num_rows, seed)]


def problems(num_rows: int, seed: int) -> list[Problem]:
    """Return the first `num_rows` problems of a seed; arguments and errors are those of `generate`."""
    available = sum(template.capacity for template in load_templates())
    if not MIN_ROWS <= num_rows <= available:
        raise ConfigError(f"num_rows is {num_rows}; it takes {MIN_ROWS} to {available}, as many as are distinct")
    if seed < 0:  # random.Random ignores the sign, so -1 would silently be 1
        raise ConfigError(f"seed is {seed}; it takes 0 or more")
    return list(itertools.islice(draw_problems(seed), num_rows))


def split(rows: Sequence[dict], held_out_fraction: float = 0.1) -> tuple[list[dict], list[dict]]:
    """Return (train, held-out) of rows from one `generate`: the last `held_out_fraction` of them is held out.

    Each round of `generate` has every template once, so both parts mix the templates evenly; no problem is in both,
    because no two rows of `generate` share their text or their template and quantities.

    Raises:
        ConfigError: one of the parts would be empty.
    """
    num_held_out = round(len(rows) * held_out_fraction) if 0 < held_out_fraction < 1 else 0
    if not 0 < num_held_out < len(rows):
        raise ConfigError(
            f"held_out_fraction is {held_out_fraction}, which leaves train or test none of the {len(rows)} rows; "
            "it takes a number between 0 and 1, such as 0.1"
        )
    return list(rows[:-num_held_out]), list(rows[-num_held_out:])


def write(output_dir: str | Path, num_rows: int = 2000, seed: int = 0) -> dict[str, int]:
    """Write `train.jsonl` and `test.jsonl`; return how many rows each has.

    Raises:
        ConfigError: as `generate`; `output_dir` is not a folder that can be written.
    """
    train, test = split(generate(num_rows, seed))
    return write_files(output_dir, {"train": train, "test": test})


def write_files(output_dir: str | Path, splits: Mapping[str, Sequence[dict]]) -> dict[str, int]:
    """Write `<split>.jsonl` of each split, each complete or not at all; return how many rows each has.

    Raises:
        ConfigError: `output_dir` is not a folder that can be written.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in splits.items():
            replace_file(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output_dir} cannot be written ({error.strerror}); name a folder that can be"
        ) from error
    return {name: len(rows) for name, rows in splits.items()}


def draw_problems(seed: int) -> Iterator[Problem]:
    """Yield distinct problems round by round; a round has each template once, in random order, until it is used up."""
    rng = random.Random(seed)
    used: set[tuple[str, tuple[int, ...]]] = set()
    for round_index in itertools.count():
        templates = [template for template in load_templates() if template.capacity > round_index]
        if not templates:
            return
        while templates:
            template = templates.pop(below(rng, len(templates)))
            numbers = draw_numbers(rng, template)
            while (template.name, numbers) in used:
                numbers = draw_numbers(rng, template)
            used.add((template.name, numbers))
            yield render(rng, template, dict(zip(template.drawn, numbers, strict=True)))


def draw_numbers(rng: random.Random, template: Template) -> tuple[int, ...]:
    """Draw the template's free quantities, in order."""
    return tuple(pick(rng, choices) for choices in template.drawn.values())


def render(rng: random.Random, template: Template, drawn: Mapping[str, int]) -> Problem:
    """Return the problem with these drawn quantities, its wording and its words chosen by `rng`."""
    quantities = dict(drawn)
    for name, formula in template.computed.items():
        quantities[name] = evaluate(formula, quantities)
    words = draw_words(rng)
    question = f"{pick(rng, template.stories)} {pick(rng, template.questions)}".format_map(words | quantities)
    steps, found = solve(template.steps, quantities, words)
    # A step may find again what was drawn; then it must find the same number.
    assert all(found[name] == value for name, value in quantities.items()), (template.name, drawn)
    return Problem(
        template=template.name,
        quantities=quantities,
        words=words,
        question=question,
        steps=steps,
        answer=found[last_name(template.steps)],
    )


def solve(
    steps: Sequence[str],
    quantities: Mapping[str, int],
    words: Mapping[str, str],
    slips: Mapping[str, int] | None = None,
) -> tuple[list[str], dict[str, int]]:
    """Return the steps with their numbers, and all quantities; `slips` stand for the results of these names.

    Raises:
        NoNaturalNumber: a result is negative or not whole.
    """
    values, told = dict(quantities), []
    for step in steps:
        for name, formula in EQUATION.findall(step):
            values[name] = slips[name] if slips and name in slips else evaluate(formula, values)
        told.append(EQUATION.sub(as_format, step).format_map({**words, **values}))
    return told, values


def last_name(steps: Sequence[str]) -> str:
    """Return the name of the quantity that the last equation finds: the answer."""
    return EQUATION.findall(steps[-1])[-1][0]


def as_format(equation: re.Match[str]) -> str:
    """Turn `[cost = count * price]` into `{count} * {price} = {cost}`."""
    name, formula = equation.groups()
    return re.sub(r"[a-z]+", r"{\g<0>}", f"{formula} = {name}")


def evaluate(formula: str, values: Mapping[str, int]) -> int:
    """Return the value of `count * price + 2`.

    Raises:
        NoNaturalNumber: it is negative or not whole.
    """

    def value_of(node: ast.expr) -> int:
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](value_of(left), value_of(right))
            case ast.Name(id=name):
                return values[name]
            case ast.Constant(value=int(number)):
                return number
        raise ValueError(f"{formula!r} is not made of + - * /, names and numbers")

    result = value_of(parse_formula(formula))
    if result < 0:
        raise NoNaturalNumber(f"{formula} is {result}")
    return result


@functools.cache
def parse_formula(formula: str) -> ast.expr:
    """Return the syntax tree of a formula."""
    return ast.parse(formula, mode="eval").body


@functools.cache
def load_templates() -> tuple[Template, ...]:
    """Return the templates of `word_problem_templates.TEMPLATES`; its docstring gives their grammar."""
    return tuple(parse_template(paragraph) for paragraph in TEMPLATES.strip().split("\n\n"))


def parse_template(paragraph: str) -> Template:
    """Return the template that a paragraph describes."""
    head, *lines = paragraph.splitlines()
    name, quantities = head.split(": ")
    drawn: dict[str, Sequence[int]] = {}
    computed = {}
    for quantity in quantities.split(", "):
        key, _, formula = quantity.partition(" = ")
        if formula:
            computed[key] = formula
            continue
        key, *choices = quantity.split()
        if ".." in choices[0]:
            lowest, highest = choices[0].split("..")
            drawn[key] = range(int(lowest), int(highest) + 1)
        else:
            drawn[key] = tuple(int(choice) for choice in choices)
    return Template(
        name=name,
        drawn=drawn,
        computed=computed,
        stories=[line for line in lines if line[:2] not in ("? ", "= ")],
        questions=[line[2:] for line in lines if line.startswith("? ")],
        steps=[line[2:] for line in lines if line.startswith("= ")],
    )


def draw_words(rng: random.Random) -> dict[str, str]:
    """Draw an entry of every kind in `WORDS`; return its forms by their keys, as they are and capitalised."""
    words = {}
    for keys, entries in WORDS.items():
        forms = pick(rng, entries.split(", ")).split("/")
        words |= dict(zip(keys.split("/"), forms, strict=True))
    return words | {key.capitalize(): word[0].upper() + word[1:] for key, word in words.items()}


def below(rng: random.Random, bound: int) -> int:
    """Draw from 0 to `bound` - 1; unlike `rng.randrange`, the same in every Python version."""
    return int(rng.random() * bound)


def pick(rng: random.Random, choices: Sequence[Choice]) -> Choice:
    """Draw one of `choices`."""
    return choices[below(rng, len(choices))]


def main(argv: Sequence[str] | None = None, write: Callable[[str, int, int], dict[str, int]] = write) -> int:
    """Write the files that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description="Make word problems.")
    parser.add_argument("--output_dir", required=True, help="folder for the files, one a split")
    parser.add_argument("--num_rows", type=int, default=2000, help="rows of training and test together")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another mixture of the same problems")
    arguments = parser.parse_args(argv)
    try:
        counts = write(arguments.output_dir, arguments.num_rows, arguments.seed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    files = ", ".join(f"{count} rows to {name}.jsonl" for name, count in counts.items())
    print(f"wrote {files} in {arguments.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
