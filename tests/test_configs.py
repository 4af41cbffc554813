"""Every YAML in configs/ runs one step, on the tiny model."""

from pathlib import Path

import pytest

from jaxpost.cli import main
from jaxpost.data.word_problems import write

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_one_step(path, tiny_folder, tmp_path):
    write(tmp_path / "data", num_rows=40, seed=0)
    method = path.stem.split("_")[0]
    given = f"--model_name_or_path {tiny_folder} --dataset_name {tmp_path / 'data'} --output_dir {tmp_path / 'out'}"
    small = "--max_steps 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --max_length 512"
    assert main([method, "--config", str(path), *given.split(), *small.split(), "--report_to", "none"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
