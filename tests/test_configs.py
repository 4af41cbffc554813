"""Every YAML in configs/ runs one step, on the tiny model, and says what it gave when it was run in full."""

from pathlib import Path

import pytest

from jaxpost import save_pretrained
from jaxpost.cli import main
from jaxpost.data import sums, word_problem_pairs, word_problems
from tests.conftest import make_model, make_tokenizer

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


WRITERS = {"sft": word_problems.write, "grpo": sums.write, "ppo": sums.write}
SMALL = {
    "grpo": "--num_generations 4 --max_completion_length 12",
    "ppo": "--num_mini_batches 1",
}  # others by the length of their rows


def method_of(path):
    return path.stem.split("_")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_one_step(path, tiny_folder, tmp_path):
    write = WRITERS.get(method_of(path), word_problem_pairs.write_pairs)
    write(tmp_path / "data", num_rows=40, seed=0)
    given = f"--model_name_or_path {tiny_folder} --dataset_name {tmp_path / 'data'} --output_dir {tmp_path / 'out'}"
    small = "--max_steps 1 --per_device_eval_batch_size 1 "
    small += SMALL.get(method_of(path), "--max_length 512")
    small += " --per_device_train_batch_size 1"
    if "--reward_model_path" in path.read_text():
        save_pretrained(make_model(head="reward"), make_tokenizer(), tmp_path / "judge")
        small += f" --reward_model_path {tmp_path / 'judge'}"
    assert main([method_of(path), "--config", str(path), *given.split(), *small.split(), "--report_to", "none"]) == 0
    weights = "adapter_model.safetensors" if "use_peft: true" in path.read_text() else "model.safetensors"
    assert (tmp_path / "out" / weights).exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_it_was_run(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [line.split(":")[0] for line in header[-3:]] == ["# command", "# hardware", "# expected"]
    assert f" {method_of(path)} " in header[-3] or "tools/" in header[-3]
