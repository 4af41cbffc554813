"""Gradients that are not finite, or far too large."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpost.cli import main
from jaxpost.data.loader import Loader
from jaxpost.metrics import Mean
from jaxpost.objectives.sft import SFT
from tests.faults.rig import checksums

pytestmark = pytest.mark.faults


@pytest.fixture
def poison(monkeypatch):
    """Multiplies the loss of steps (from 1) by a number."""
    factors = {}
    batch, empty, loss = Loader.batch, Loader.empty, SFT.loss

    def factor(self, step=None):
        rows = self._num_rows // self._process_count
        return {"factor": np.full(rows, factors.get(step + 1, 1.0) if step is not None else 1.0, np.float32)}

    def scaled(self, model, given):
        mean, metrics = loss(self, model, given)
        return Mean(mean.total * jnp.max(given["factor"]), mean.count), metrics

    monkeypatch.setattr(Loader, "batch", lambda self, step: batch(self, step) | factor(self, step))
    monkeypatch.setattr(Loader, "empty", lambda self, length: empty(self, length) | factor(self))
    monkeypatch.setattr(SFT, "loss", scaled)
    return factors


def run(rig, out, flags=""):
    base = f"sft --model_name_or_path {rig.model} --dataset_name {rig.home}/sft.jsonl --report_to none"
    shared = "--per_device_train_batch_size 1 --max_length 64 --learning_rate 1e-3 --logging_steps 1"
    code = main(f"{base} --output_dir {out} {shared} {flags}".split())
    return code, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def learned(out, step):
    """Checksums of all but the number of the step."""
    return {name: value for name, value in checksums(out, step).items() if name != "step"}


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(rig, tmp_path, poison):
    poison[4] = np.nan
    code, rows = run(rig, tmp_path / "out", "--max_steps 6 --save_steps 1 --lr_scheduler_type constant")
    assert code == 0
    assert learned(tmp_path / "out", 3) == learned(tmp_path / "out", 4) != learned(tmp_path / "out", 5)
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 0, 1, 1, 1]
    assert all(np.isfinite(row["loss"]) for row in rows if row["step"] != 4)


def test_five_in_a_row_end_the_run_with_a_healthy_checkpoint(rig, tmp_path, poison, capsys):
    poison |= dict.fromkeys(range(4, 30), np.inf)
    code, _ = run(rig, tmp_path / "out", "--max_steps 20 --save_steps 2")
    assert code == 77
    assert "not finite in 5 steps in a row, the last at step 8" in capsys.readouterr().err
    sums = [learned(tmp_path / "out", step) for step in (2, 4, 6)]
    assert sums[0] != sums[1] == sums[2]
    poison.clear()
    code, rows = run(rig, tmp_path / "out", "--max_steps 20 --save_steps 2")
    assert code == 0 and rows[-1]["step"] == 20
    assert all(np.isfinite(value).all() for value in load_file(tmp_path / "out" / "model.safetensors").values())


def test_a_spike_is_left_out(rig, tmp_path, poison):
    shared = "--max_steps 40 --save_strategy no --eval_strategy steps --eval_steps 40 --dataset_test_split train"
    _, clean = run(rig, tmp_path / "clean", shared)
    poison[30] = 1e4
    _, skipping = run(rig, tmp_path / "skipping", f"{shared} --skip_spikes 6")
    assert skipping[-2]["skipped_steps"] == 1 and clean[-2].get("skipped_steps") is None
    assert skipping[-1]["eval_loss"] == pytest.approx(clean[-1]["eval_loss"], rel=0.02)
