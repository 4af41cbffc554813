"""The first steps of BCO against TRL 1.10, the last that has it; it is installed beside the newer one for this test."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.objectives.bco_losses import bco_loss
from tests.parity.older_trl import run
from tests.parity.test_preference_step import JUDGED, our_log, write_model

pytestmark = pytest.mark.parity
STEPS = 3

STEPPING = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.bco import BCOConfig, BCOTrainer

policy, reference, rows, output, settings = sys.argv[1:]
args = BCOConfig(output_dir=output, logging_steps=1, bf16=False, gradient_checkpointing=False, use_cpu=True,
                 report_to=[], save_strategy="no", train_sampling_strategy="sequential", **json.loads(settings))
tokenizer = AutoTokenizer.from_pretrained(policy)
tokenizer.bos_token = None  # which it puts before the prompt even if the tokenizer does not
trainer = BCOTrainer(
    AutoModelForCausalLM.from_pretrained(policy),
    AutoModelForCausalLM.from_pretrained(reference),
    args=args,
    train_dataset=Dataset.from_list(json.loads(rows)),
    processing_class=tokenizer,
)
trainer.train()
print(json.dumps([row for row in trainer.state.log_history if "loss" in row]))
"""


LOSS = """
import json, sys, types
import torch
from trl.experimental.bco import BCOTrainer

logps, reference, chosen, shift, beta = json.loads(sys.argv[1])
leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
reference = torch.tensor(reference, dtype=torch.float64)
running = types.SimpleNamespace(update=lambda rewards: None, mean=torch.tensor(shift, dtype=torch.float64))
trainer = types.SimpleNamespace(beta=beta, running=running, match_underlying_distribution=False)
sides = [side for part in (leaf, reference) for side in (part[:chosen], part[chosen:])]
losses = BCOTrainer.bco_loss(trainer, *sides, None, None)[0]
losses.mean().backward()
print(json.dumps([losses.mean().item(), leaf.grad.tolist()]))
"""


def test_first_steps_equal_trl(older_trl, tmp_path):
    folders = write_model(tmp_path / "policy", 0), write_model(tmp_path / "reference", 1)
    rows = [
        {"prompt": row["prompt"][0]["content"], "completion": row["completion"][0]["content"], "label": row["label"]}
        for row in JUDGED
    ]
    shared = {"max_steps": STEPS, "max_length": 256, "learning_rate": 1e-3, "beta": 0.2}
    ours = our_log("bco", folders, rows, tmp_path / "ours", per_device_train_batch_size=1, **shared)
    settings = json.dumps({**shared, "per_device_train_batch_size": 8})
    theirs = run(STEPPING, older_trl, *folders, json.dumps(rows), tmp_path / "theirs", settings)
    assert len(ours) == len(theirs) == STEPS
    names = ["loss", "delta", *(f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected"))]
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in [*names, "rewards/margins", "grad_norm"]:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=f"{name} of step {step}")
    assert len({row["delta"] for row in ours}) == STEPS


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_loss_and_gradient_equal_trl_in_float64(older_trl, shift):
    rng, chosen, beta = np.random.default_rng(8), 3, 0.3
    logps, reference = rng.normal(-20, 6, (2, 8))
    label = np.arange(8) < chosen

    def ours(logps):
        return jnp.mean(bco_loss(beta * (logps - reference), jnp.asarray(shift), jnp.asarray(label, logps.dtype)))

    value, gradient = run(LOSS, older_trl, json.dumps([logps.tolist(), reference.tolist(), chosen, shift, beta]))
    with jax.enable_x64(True):
        found, slope = jax.value_and_grad(ours)(jnp.asarray(logps))
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5)
