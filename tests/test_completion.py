"""Completion as a shell does it."""

import re
import shutil
import subprocess

import pytest

from jaxpost.cli import COMMANDS
from jaxpost.completion import table_of
from jaxpost.methods import METHODS
from jaxpost.shells import SHELLS

TRY = """
{script}
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_jaxpost
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def table():
    return table_of(COMMANDS)


@pytest.fixture(scope="module")
def script(table):
    return SHELLS["bash"](table)


def completed(script, words):
    command = ["bash", "-c", TRY.format(script=script), "bash", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    return set(done.stdout.split())


CASES = {
    "jaxpost s": {"sft", "simpo"},
    "jaxpost --h": {"--help"},
    "jaxpost plan ": set(METHODS),
    "jaxpost plan sft --topo": {"--topology"},
    "jaxpost sft --topo": set(),
    "jaxpost sft --dry": {"--dry_run"},
    "jaxpost evaluate --allow_u": {"--allow_untrained_head"},
    "jaxpost evaluate dp": {"dpo"},
    "jaxpost evaluate dpo --loss_": {"--loss_type", "--loss_weights"},
    "jaxpost sft --loss_type ": {"nll", "dft"},
    "jaxpost kto --loss_type ": {"kto", "apo_zero_unpaired"},
    "jaxpost dpo --loss_type sigmoid a": {"apo_zero", "apo_down", "aot", "aot_unpaired"},
    "jaxpost sft --dtype = b": {"bfloat16"},
    "jaxpost sft --dtype =": {"float32", "bfloat16", "float16"},
    "jaxpost sft --loss_type = dft --dtype f": {"float32", "float16"},
    "jaxpost sft --packing t": {"true"},
    "jaxpost sft --packing --print": {"--print_config"},
    "jaxpost sft --dataset_name ": set(),  # files, which bash knows
    "jaxpost completion ": set(SHELLS),
    "jaxpost nonsense --l": set(),
}


@pytest.mark.parametrize("line", CASES)
def test_bash_completes(script, line):
    assert completed(script, line.split(" ")) == CASES[line]


def test_all_flags_follow_a_value(script, table):
    names = {f"--{flag.name}" for flag in table["sft"].flags["sft"]}
    assert completed(script, ["jaxpost", "sft", "--loss_type", "nll", ""]) == names


def test_names_need_no_quotes(table):
    for entry in table.values():
        for flags in entry.flags.values():
            assert all(re.fullmatch(r"[\w.]+", word) for flag in flags for word in (flag.name, *flag.values))


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_valid_and_say_how_to_install_them(shell, table, tmp_path):
    text = SHELLS[shell](table)
    assert f"jaxpost completion {shell} > " in text and "@" not in text.replace("$@", "").replace("[@]", "")
    for word in (*COMMANDS, *METHODS, "learning_rate", "bfloat16"):
        assert word in text
    if shutil.which(shell):
        file = tmp_path / "script"
        file.write_text(text)
        subprocess.run([shell, "-n", str(file)], check=True)
