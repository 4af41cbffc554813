"""The first step of a run against TRL's SFTTrainer: same folder, same rows, same flags."""

import json

import numpy as np
import pytest

from jaxpost.cli import main
from jaxpost.data.word_problems import generate

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def rows():
    return [{name: row[name] for name in ("prompt", "completion")} for row in generate(24)][:8]


def trl_log(folder, rows, output_dir, **changes):
    """What TRL logs for the first step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=8,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        max_length=512,
        **changes,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(
    "changes", [{}, {"completion_only_loss": False}, {"loss_type": "dft"}], ids=["default", "whole", "dft"]
)
def test_first_step_equals_trl(tiny_folder, rows, tmp_path, changes):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    command = f"sft --model_name_or_path {tiny_folder} --dataset_name {data} --output_dir {tmp_path / 'ours'}"
    shared = "--max_steps 1 --logging_steps 1 --per_device_train_batch_size 1 --max_length 512 --save_strategy no"
    assert main([*command.split(), *shared.split(), "--report_to", "none", *flags]) == 0
    ours = json.loads((tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()[0])
    theirs = trl_log(tiny_folder, rows, tmp_path / "theirs", **changes)
    np.testing.assert_allclose(ours["loss"], theirs["loss"], atol=1e-5)
    for name in ("grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)
