"""What `--help` looks like, at any width."""

import dataclasses
import io

import pytest
from rich.console import Console

from jaxpost.commands import DryRunConfig
from jaxpost.flags import flags_of, shown
from jaxpost.help_text import WIDEST, print_help
from jaxpost.methods import METHODS
from jaxpost.options import Group
from jaxpost.parsing import FileConfig
from jaxpost.planning.command import plan_config


def help_of(name, width=80, **options):
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True, **options)
    print_help(name, "what it does", flags_of([METHODS[name].config, DryRunConfig, FileConfig]), console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 160, 300])
@pytest.mark.parametrize("name", METHODS)
def test_no_line_is_too_long_and_no_flag_missing(name, width):
    text = help_of(name, width)
    assert max(map(len, text.splitlines())) <= min(width, WIDEST)
    assert text.count("(default: ") == text.count("\n  --") == len(flags_of([METHODS[name].config])) + 3


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_own_flags_come_first(name):
    lines = help_of(name).splitlines()
    assert lines[0] == f"usage: jaxpost {name} [--config FILE.yaml] [--flag value ...]"
    own = lines.index(f"Flags of jaxpost {name}")
    shared = [lines.index(group) for group in Group if group in lines]
    assert own < min(shared) and shared == sorted(shared)
    fields = {line.split()[0] for line in lines[own : min(shared)] if line.startswith("  --")}
    objective = {f"--{field.name}" for field in dataclasses.fields(METHODS[name].objective)}
    assert fields - {"--value_learning_rate", "--reward_model_path"} == objective - {"--temperature"}


def test_a_flag_shows_its_kind_meaning_and_default():
    text = " ".join(help_of("dpo").split())
    assert "--learning_rate FLOAT Peak learning rate. (default: 1e-06)" in text
    assert "--loss_type NAME ... Losses that are added up, of sigmoid," in text and "sft. (default: sigmoid)" in text
    assert "--use_peft Train a low-rank adapter (LoRA) instead of the whole model. (default: false)" in text
    assert "{% generation %}" in help_of("sft") and "%%" not in help_of("sft")


def test_a_terminal_gets_colours_and_a_pipe_none():
    assert "\x1b" not in help_of("sft")
    assert "\x1b[1mModel\x1b[0m" in help_of("sft", force_terminal=True, color_system="standard")


def test_a_plan_begins_with_its_own_flags():
    flags = flags_of([plan_config(METHODS["sft"])])
    assert [flag.name for flag in flags[:2]] == ["topology", "prompt_length"]


def test_values_are_spelled_as_on_the_command_line():
    assert list(map(shown, (None, True, 1e-5, 3.0, [], ["a", "b"], "x"))) == [
        *("null", "true", "1e-05", "3", "[]", "a b", "x"),
    ]
