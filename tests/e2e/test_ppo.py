"""PPO by the command line and in Python: every kind of value model, resumed in the middle of a generation's epochs."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpost import save_pretrained
from jaxpost.cli import main
from tests.conftest import make_model, make_tokenizer
from tests.e2e.test_grpo import PROMPTS, REWARD, logged
from tests.e2e.test_lora import assert_same

LORA = "--use_peft --lora_r 4 --lora_target_modules all-linear"
NAMES = {
    *(f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")),
    *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg"),
    *("val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens"),
    *("generation_time", "reward_time", "completions/mean_length", "rewards/early/mean"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("ppo")
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (home / "rewards.py").write_text(REWARD)
    return home


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A reward model with the policy's vocabulary."""
    folder = tmp_path_factory.mktemp("reward") / "judge"
    save_pretrained(make_model(head="reward"), make_tokenizer(), folder)
    return folder


def run(model, home, output_dir, flags=""):
    base = f"ppo --model_name_or_path {model} --dataset_name {home}/prompts.jsonl --output_dir {output_dir}"
    shared = (
        "--report_to none --per_device_train_batch_size 4 --num_mini_batches 2 --num_ppo_epochs 2 --logging_steps 1 "
        "--max_completion_length 6 --learning_rate 1e-2 --max_steps 6 --save_steps 3 --lr_scheduler_type constant"
    )
    return main([*base.split(), *shared.split(), "--reward_funcs", f"{home}/rewards.py:early", *flags.split()])


def weights(folder):
    return load_file(next(path for path in folder.iterdir() if path.suffix == ".safetensors"))


@pytest.fixture(scope="module")
def ppo(tiny_folder, home, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "ppo"
    assert (
        run(tiny_folder, home, out, "--adap_kl_ctrl --horizon 100 --max_kl 1e-3 --gradient_accumulation_steps 2") == 0
    )
    return out


def test_metrics_are_named_as_in_trl_and_the_policy_is_held_where_it_has_moved_too_far(ppo):
    log = logged(ppo)
    assert len(log) == 6
    for row in log:
        assert set(row) >= NAMES - {"generation_time", "reward_time", "completions/mean_length", "rewards/early/mean"}
        assert all(np.isfinite(value) for value in row.values())
    assert set(log[0]) >= NAMES and set(log[4]) >= NAMES
    assert log[0]["sampling/sampling_logp_difference/max"] < 1e-5
    assert abs(log[0]["val/ratio"] - 1) < 1e-6 and log[0]["val/num_eos_tokens"] <= 64
    assert log[0]["policy/held"] == 0 and log[3]["policy/held"] == 1
    assert log[4]["policy/held"] == 0  # the next generation
    assert log[0]["objective/kl_coef"] == pytest.approx(0.05) and log[4]["objective/kl_coef"] < 0.05


def test_resumed_in_the_middle_of_the_epochs_equals_uninterrupted_bit_for_bit(ppo, tiny_folder, home, tmp_path):
    flags = "--adap_kl_ctrl --horizon 100 --max_kl 1e-3 --gradient_accumulation_steps 2"
    assert run(tiny_folder, home, tmp_path / "parts", f"{flags} --max_steps 3") == 0
    assert run(tiny_folder, home, tmp_path / "parts", f"{flags} --resume_from_checkpoint true") == 0
    assert_same(weights(tmp_path / "parts"), weights(ppo))
    assert_same(weights(tmp_path / "parts" / "value_model"), weights(ppo / "value_model"))
    for one, other in zip(logged(tmp_path / "parts"), logged(ppo), strict=True):
        assert one["loss"] == other["loss"] and one["grad_norm"] == other["grad_norm"]
