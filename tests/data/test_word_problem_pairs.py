"""The project's own preference pairs: what is wrong in them is wrong, and told as the kind says."""

import difflib
import hashlib
import json
import re
import statistics
import subprocess
import sys

import pytest

from jaxpost.data.sources import load_rows
from jaxpost.data.word_problem_pairs import KINDS, generate_pairs, write_pairs
from jaxpost.data.word_problems import generate, load_templates, main, problems
from jaxpost.errors import ConfigError

COUNT = 3000
ROWS = generate_pairs(COUNT, seed=5)
PROBLEMS = problems(COUNT, seed=5)


def text(row, side):
    [message] = row[side]
    assert message["role"] == "assistant"
    return message["content"]


def answer(solution):
    [number] = re.findall(r"^#### (\d+)$", solution, re.MULTILINE)
    assert solution.endswith(f"#### {number}")
    return number


def of_kind(kind):
    return [(row, problem) for row, problem in zip(ROWS, PROBLEMS, strict=True) if row["kind"] == kind]


def test_chosen_is_the_right_solution():
    for row, plain in zip(ROWS, generate(COUNT, seed=5), strict=True):
        assert (row["prompt"], row["chosen"], row["answer"]) == (plain["prompt"], plain["completion"], plain["answer"])
        assert answer(text(row, "chosen")) == row["answer"] != answer(text(row, "rejected"))


def test_kinds_come_in_turn_and_equal_seeds_give_equal_bytes():
    assert [row["kind"] for row in ROWS] == list(KINDS) * (COUNT // 2)
    assert generate_pairs(40, seed=5) == ROWS[:40]
    assert generate_pairs(40, seed=6) != ROWS[:40]
    digest = hashlib.sha256(json.dumps(ROWS).encode()).hexdigest()
    assert digest[:16] == "5f08e29a226e9495"


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_that_of_the_last_step(kind):
    for row, _ in of_kind(kind):
        *_, last, number = text(row, "rejected").split("\n")
        assert re.findall(r"= (\d+)", last)[-1] == number.removeprefix("#### ")


def test_hard_ones_follow_the_right_solution_and_go_on_with_their_fault():
    for row, _ in of_kind("hard"):
        right, wrong = (text(row, side).split("\n")[:-1] for side in ("chosen", "rejected"))
        assert len(wrong) in (len(right), len(right) - 1)
        assert difflib.SequenceMatcher(None, right[0], wrong[0]).ratio() > 0.8
        for one, other in zip(right, wrong, strict=False):  # the same words, other numbers or another operation
            assert re.sub(r"\d+|[-+*/] ", "", one) == re.sub(r"\d+|[-+*/] ", "", other)


def test_every_kind_of_fault_and_of_template_is_there():
    names = {template.name for template in load_templates()}
    assert {problem.template for _, problem in of_kind("hard")} == names
    faults = {"left out": 0, "operation": 0, "numbers": 0}
    for row, _ in of_kind("hard"):
        right, wrong = text(row, "chosen"), text(row, "rejected")
        signs = [re.findall(r" ([-+*/]) ", solution) for solution in (right, wrong)]
        faults[
            "left out"
            if right.count("\n") > wrong.count("\n")
            else "operation"
            if len({*map(str, signs)}) > 1
            else "numbers"
        ] += 1
    assert all(count > COUNT / 20 for count in faults.values()), faults


def test_easy_ones_are_of_another_problem_or_do_not_add_up():
    others = 0
    for row, problem in of_kind("easy"):
        wrong = text(row, "rejected").split("\n")
        if re.sub(r"\d+", "", wrong[0]) != re.sub(r"\d+", "", problem.steps[0]):
            others += 1
        else:
            assert int(answer(text(row, "rejected"))) >= problem.answer + 1000
    assert 0.4 < others / (COUNT / 2) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_length_does_not_tell_which_is_right(kind):
    lengths = {
        side: statistics.mean(len(text(row, side)) for row, _ in of_kind(kind)) for side in ("chosen", "rejected")
    }
    assert abs(lengths["rejected"] / lengths["chosen"] - 1) < 0.15, lengths


def test_rows_hold_nothing_of_later_ones():
    """So no test problem's solution is rejected in training."""
    solutions = {text(row, "chosen"): i for i, row in reversed(list(enumerate(ROWS)))}
    easy = ((i, text(row, "rejected")) for i, row in enumerate(ROWS) if row["kind"] == "easy")
    assert all(solutions.get(wrong, -1) < i for i, wrong in easy)


def test_files_are_splits(tmp_path):
    assert write_pairs(tmp_path, num_rows=60, seed=1) == {"train": 54, "test": 6, "hard": 3, "easy": 3}
    assert len(load_rows(str(tmp_path), "train")) == 54
    hard, easy, test = (list(load_rows(str(tmp_path), split)) for split in ("hard", "easy", "test"))
    assert [dict(row) for row in test[0::2]] == [dict(row) for row in hard]
    assert {row["kind"] for row in easy} == {"easy"}


def test_command(tmp_path, capsys):
    module = "jaxpost.data.word_problem_pairs"
    command = [sys.executable, "-m", module, "--output_dir", str(tmp_path), "--num_rows", "40"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("wrote 36 rows to train.jsonl, 4 rows to test.jsonl, 2 rows to hard.jsonl")
    (tmp_path / "file").write_text("")
    for flags in (["--num_rows", "3"], ["--seed", "-1"], ["--output_dir", str(tmp_path / "file")]):
        assert main(["--output_dir", str(tmp_path), *flags], write_pairs) == 2
        assert "error: " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="num_rows is 10"):
        generate_pairs(10**9)
