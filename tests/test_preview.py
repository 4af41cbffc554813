"""What `jaxpost preview` shows, and that it writes and trains nothing."""

import io

import pytest
from rich.console import Console

from jaxpost import SFTConfig
from jaxpost.cli import main
from jaxpost.data.word_problems import write
from jaxpost.methods import METHODS
from jaxpost.preview import run_preview


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "data", num_rows=60, seed=0)
    return tmp_path / "data"


def test_rows_counts_packing_and_examples_are_shown(tiny_folder, data, tmp_path, capsys):
    flags = f"--model_name_or_path {tiny_folder} --dataset_name {data} --output_dir {tmp_path / 'out'}"
    options = "--packing --max_length 600 --max_steps 3 --per_device_train_batch_size 1 --test_split_size 5"
    assert main(["preview", "sft", *flags.split(), *options.split()]) == 0
    shown = capsys.readouterr().out
    assert "max_length: 600" in shown and "packing: true" in shown
    assert "rows: prompt_completion with messages (told by column 'prompt')" in shown
    assert " rows, 0 without a token to train dropped" in shown and "% full" in shown and "3 steps" in shown
    assert shown.count("trained ─") == 3
    assert shown.count("<|im_start|>assistant\n«") == 3 and shown.count("<|im_end|>\n»") == 3
    assert not (tmp_path / "out").exists()


def test_trained_tokens_are_coloured_on_a_terminal(tiny_folder, data):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", soft_wrap=True)
    args = SFTConfig(model_name_or_path=str(tiny_folder), dataset_name=str(data), max_steps=1)
    run_preview(METHODS["sft"], args, console)
    shown = console.file.getvalue()
    assert "\x1b[1;32m" in shown and "«" not in shown


def test_prompts_are_shown_of_methods_that_sample(tiny_folder, data, capsys):
    flags = f"--model_name_or_path {tiny_folder} --dataset_name {data} --max_completion_length 16 --max_steps 7"
    assert main(["preview", "grpo", *flags.split()]) == 0
    shown = capsys.readouterr().out
    assert "7 steps; a generation is 8 prompts with 8 completions each" in shown
    assert "columns for reward functions: completion, answer" in shown
    assert shown.count("tokens ─") == 3 and shown.count("<|im_start|>user") == 3


@pytest.mark.parametrize(("more", "told"), [("", True), ("--use_peft", False)])
def test_flags_of_an_adapter_that_is_not_asked_for_are_told(tiny_folder, data, capsys, more, told):
    flags = f"--model_name_or_path {tiny_folder} --dataset_name {data} --lora_r 8 --use_dora --max_steps 1"
    assert main(["preview", "sft", *flags.split(), *more.split()]) == 0
    assert ("lora_r, use_dora: set without use_peft" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--dataset_name", "nowhere.jsonl"], 3, "nowhere.jsonl: no such file"),
        (["--max_lenght", "3"], 2, "did you mean '--max_length'"),
        ([], 2, "no data"),
    ],
)
def test_mistakes_are_those_of_training(flags, code, message, tiny_folder, capsys):
    assert main(["preview", "--model_name_or_path", str(tiny_folder), *flags]) == code
    assert message in capsys.readouterr().err
