"""The word problems: right answers, right English, nothing shared by train and test, the same bytes every time."""

import hashlib
import json
import re
import string
import subprocess
import sys
from fractions import Fraction
from itertools import islice

import pytest

from jaxpost.data.word_problem_templates import WORDS
from jaxpost.data.word_problems import EQUATION, draw_problems, generate, load_templates, main, split, write
from jaxpost.errors import ConfigError

# A long way past the default, so that rare draws are seen too.
PROBLEMS = list(islice(draw_problems(seed=3), 6000))
ROWS = generate()


def texts(row: dict) -> tuple[str, str]:
    return row["prompt"][0]["content"], row["completion"][0]["content"]


def value_of(expression: str) -> Fraction:
    """Evaluate `12 - 3 * 2` independently of the generator: products first, then sums, both left to right."""
    total = Fraction(0)
    for sign, product in re.findall(r"([+-]) ((?:\d+(?: [*/] )?)+)", f"+ {expression}"):
        first, *factors = re.split(r" ([*/]) ", product)
        value = Fraction(first)
        for mark, factor in zip(factors[::2], factors[1::2], strict=True):
            value = value * int(factor) if mark == "*" else value / int(factor)
        total += value if sign == "+" else -value
    return total


def fields(text: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(text) if field}


def test_value_of_knows_the_order_of_operations():
    assert value_of("12 - 3 * 2 + 10 / 4") == Fraction(17, 2)


def test_rows_have_the_conversational_shape_and_end_in_the_answer():
    assert len(ROWS) == 2000
    for row in ROWS:
        prompt, completion = texts(row)
        assert row == {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
            "answer": row["answer"],
        }
        assert re.fullmatch(r"0|[1-9]\d{0,4}", row["answer"])
        assert completion.endswith(f"\n#### {row['answer']}") and completion.count("####") == 1
        assert 2 <= completion.count("\n") <= 4


def test_every_equation_holds_and_the_last_gives_the_answer():
    for problem in PROBLEMS:
        solution = "\n".join(problem.steps)
        equations = re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)\b", solution)
        assert len(equations) == solution.count("=") >= 2
        for left, right in equations:
            assert value_of(left) == int(right), solution
        assert int(equations[-1][1]) == problem.answer


def test_equations_use_only_what_the_problem_or_an_earlier_step_gives():
    for template in load_templates():
        for story in template.stories:
            for question in template.questions:
                known = fields(f"{story} {question}")
                for step in template.steps:
                    known |= fields(EQUATION.sub("", step))  # such as the {full} boxes of a division with remainder
                    for name, formula in EQUATION.findall(step):
                        assert set(re.findall("[a-z]+", formula)) <= known, (template.name, story, step)
                        known.add(name)


def test_every_number_of_a_story_is_used_and_every_wording_shows_the_same_numbers():
    words = {form for keys in WORDS for key in keys.split("/") for form in (key, key.capitalize())}
    for template in load_templates():
        quantities = {*template.drawn, *template.computed}
        assert not quantities & words
        used = {name for _, formula in EQUATION.findall(" ".join(template.steps)) for name in formula.split()}
        used |= {name for step in template.steps for name in fields(EQUATION.sub("", step))}
        shown = {
            frozenset(fields(f"{story} {question}") & quantities)
            for story in template.stories
            for question in template.questions
        }
        assert len(shown) == 1, template.name
        assert next(iter(shown)) <= used, template.name


def test_there_are_many_templates_each_with_several_wordings():
    templates = load_templates()
    assert len(templates) >= 24
    assert len({template.name for template in templates}) == len(templates)
    assert len({tuple(template.steps) for template in templates}) == len(templates)
    for template in templates:
        assert len(template.stories) * len(template.questions) >= 4
        assert 2 <= len(template.steps) <= 4
        assert template.capacity >= 200


def test_english():
    for problem in PROBLEMS:
        for text in (problem.question, *problem.steps):
            assert text[0].isupper() and text[-1] in ".?", text
            assert not re.search(r"[{}\[\]]|  | [.,?]|\.\.", text), text
            assert not re.search(r"[.?] [^A-Z]", text), text  # every sentence starts with a capital letter
            assert not re.search(r"(?<![/\d])1 [a-z]+s\b", text), text  # 1 apples
            assert not re.search(r"\b[Aa] (?:[aeio]|u(?!ni|se)|8\d*\b|1[18]\b)", text), text
            assert not re.search(r"\b[Aa]n (?![aeiou8]|hour|1[18])", text), text
            assert not re.search(r"\b(\w+) \1\b", text), text  # the the


def test_lengths_fit_the_budget():
    """60 to 180 tokens with about 30 for the chat template, at 4 characters a token."""
    lengths = [sum(map(len, texts(row))) / 4 + 30 for row in ROWS]
    assert all(60 <= length <= 180 for length in lengths)
    assert 85 <= sum(lengths) / len(lengths) <= 125


def test_no_problem_occurs_twice_and_train_and_test_share_none():
    keys = {(problem.template, tuple(problem.quantities.values())) for problem in PROBLEMS}
    assert len(keys) == len({problem.question for problem in PROBLEMS}) == len(PROBLEMS)
    train, test = split(ROWS)
    assert (len(train), len(test)) == (1800, 200) and train + test == ROWS
    assert not {texts(row)[0] for row in train} & {texts(row)[0] for row in test}


def test_both_parts_have_every_template():
    problems = list(islice(draw_problems(seed=0), 2000))
    assert [problem.as_row() for problem in problems] == ROWS
    names = {template.name for template in load_templates()}
    for part in (problems[:1800], problems[1800:]):
        assert {problem.template for problem in part} == names


def test_equal_seeds_give_equal_bytes():
    """The digest is of 60 rows of seed 0; only an intended change of words or templates may move it."""
    digest = hashlib.sha256(json.dumps(generate(60)).encode()).hexdigest()
    assert digest == "4af3afb86541ba1d9cb46a6a03fc1b689ec41f38614366e65d26415badf841c3"
    assert generate(100, seed=5)[:60] == generate(60, seed=5)
    assert generate(60, seed=5) != generate(60, seed=6)


def test_all_problems_can_be_drawn():
    """A template that runs out stops, and the others go on to the last distinct problem."""
    smallest = min(template.capacity for template in load_templates())
    names = [problem.template for problem in islice(draw_problems(seed=1), (smallest + 5) * len(load_templates()))]
    assert min(names.count(template.name) for template in load_templates()) == smallest


def test_write(tmp_path):
    folder = tmp_path / "new" / "data"
    assert write(folder, num_rows=50, seed=2) == {"train": 45, "test": 5}
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl"]
    train, test = ((folder / name).read_bytes() for name in ("train.jsonl", "test.jsonl"))
    assert (train.count(b"\n"), test.count(b"\n")) == (45, 5)
    assert [json.loads(line) for line in (train + test).split(b"\n")[:-1]] == generate(50, seed=2)
    assert b"\r" not in train + test


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    write(tmp_path, num_rows=50)
    before = (tmp_path / "train.jsonl").read_bytes()

    def full_disk(file_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        write(tmp_path, num_rows=60)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_command(tmp_path):
    command = [sys.executable, "-m", "jaxpost.data.word_problems", "--output_dir", str(tmp_path), "--num_rows", "40"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout == f"wrote 36 rows to train.jsonl, 4 rows to test.jsonl in {tmp_path}\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_rows", "19"], "num_rows is 19; it takes 20 to "),
        (["--num_rows", "100000000"], "num_rows is 100000000"),
        (["--seed", "-1"], "seed is -1"),
        (["--output_dir", __file__], "--output_dir"),
        (["--output_dir", __file__ + "/sub"], "--output_dir"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(tmp_path, capsys, flags, words):
    assert main(["--output_dir", str(tmp_path / "out"), *flags]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.001, float("nan")])
def test_split_refuses_an_empty_part(fraction):
    with pytest.raises(ConfigError, match="held_out_fraction"):
        split(ROWS[:50], fraction)
