"""PPO by the command line and in Python: every kind of value model, resumed in the middle of a generation's epochs."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxpost import PPOConfig, PPOTrainer, from_pretrained, save_pretrained
from jaxpost.cli import main
from tests.conftest import make_model, make_tokenizer
from tests.e2e.test_grpo import PROMPTS, REWARD, logged
from tests.e2e.test_lora import assert_same
from tests.marks import slow

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


@pytest.mark.parametrize(
    ("value_model", "flags"),
    [
        ("trunk", "--value_warmup_steps 1 --value_learning_rate 1e-3"),
        slow("trunk", LORA),
        ("adapter", f"{LORA} --lora_dropout 0.1 --disable_dropout false --max_grad_norm 0"),
        slow("copy", f"{LORA} --kl_estimator k3 --whiten_rewards --missing_eos_penalty 1 --num_generations 2"),
        slow("copy", "--sync_ref_model --ref_model_sync_steps 1 --entropy_coef 0.01 --reward_clip_range -1 0.5"),
    ],
)
def test_other_value_models(tiny_folder, home, tmp_path, value_model, flags):
    out = tmp_path / "out"
    assert run(tiny_folder, home, out, f"--value_model {value_model} --save_strategy no --max_steps 2 {flags}") == 0
    log = logged(out)
    assert all(np.isfinite(value) for row in log for value in row.values())
    assert all(row["grad_norm"] > 0 for row in log)
    critic = from_pretrained(out / "value_model", head="reward")
    tokens = np.arange(3, 27).reshape(2, 12)
    assert np.abs(critic(tokens)).max() > 0
    assert ("adapter_model.safetensors" in {path.name for path in out.iterdir()}) == ("use_peft" in flags)
    if value_model == "trunk":  # its head stands on what the policy has become
        policy = from_pretrained(out)
        np.testing.assert_allclose(hidden(critic, tokens), hidden(policy, tokens), rtol=1e-4, atol=1e-5)


def hidden(model, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return model.hidden(*(jax.numpy.asarray(x) for x in (tokens, positions, np.ones_like(tokens))))[0]


def test_adapters_share_one_base(tiny_folder, tmp_path):
    lora = {"use_peft": True, "lora_r": 1, "lora_target_modules": ["q_proj"]}
    shared = {
        "max_completion_length": 4,
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 1,
        "report_to": ["none"],
        "max_steps": 1,
    }
    trainer = PPOTrainer(
        model=str(tiny_folder),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=PPOConfig(value_model="adapter", **lora, **shared),
        train_dataset=PROMPTS,
    )
    base = sum(x.nbytes for x in jax.tree.leaves(nnx.state(from_pretrained(tiny_folder))))
    reference = trainer.reference.build(trainer.model, trainer.reference.arrays)
    state = nnx.split((trainer.model, reference))[1]
    buffers = {x.unsafe_buffer_pointer(): x.nbytes for leaf in jax.tree.leaves(state) for x in shards(leaf)}
    trained = sum(x.nbytes for x in jax.tree.leaves(nnx.state(trainer.model, trainer.trainable)))
    assert sum(buffers.values()) - trained <= 1.15 * base
    stored = sum(x.nbytes for x in jax.tree.leaves(nnx.split(trainer.model, trainer.trainable, ...)[2]))
    assert stored <= 1.05 * base


def shards(leaf):
    return [shard.data for shard in leaf.addressable_shards]


def test_python_face_with_models_of_its_own(tiny_folder, reward_folder, tmp_path):
    args = PPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=1,
        max_completion_length=4,
        num_ppo_epochs=1,
        max_steps=1,
        report_to=["none"],
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer = PPOTrainer(
        model=from_pretrained(tiny_folder),
        args=args,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        processing_class=make_tokenizer(),
        ref_model=from_pretrained(tiny_folder),
        reward_model=from_pretrained(reward_folder, head="reward"),
        value_model=from_pretrained(reward_folder, head="reward"),
    )
    metrics = trainer.train()
    assert {"rewards/reward_model/mean", "eval_rewards/reward_model/mean"} <= metrics.keys()


def test_reward_models_of_any_vocabulary(tiny_folder, reward_folder, home, tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["what"])
    save_pretrained(make_model(head="reward"), tokenizer, tmp_path / "other")
    for folder, start in ((reward_folder, reward_folder), (tmp_path / "other", "a copy of the policy")):
        out = tmp_path / f"out {folder.name}".replace(" ", "_")
        flags = f"--reward_model_path {folder} --reward_weights 1 0.5 --max_steps 1 --num_ppo_epochs 1"
        assert run(tiny_folder, home, out, flags) == 0
        assert f"rewards/{folder.name}/mean" in logged(out)[0]
        assert f"the value model starts {'as' if 'copy' in str(start) else 'from'} {start}" in capsys.readouterr().out
    flags = f"--value_model_path {tmp_path / 'other'}"
    assert run(tiny_folder, home, tmp_path / "refused", flags) == 2
    assert "has another vocabulary than the policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_mini_batches 3", "num_mini_batches is 3; it must divide the 4 completions"),
        ("--num_ppo_epochs 0", "num_ppo_epochs is 0; it must be at least 1"),
        ("--target_kl 0", "target_kl is 0.0; it must be above 0"),
        ("--kl_coef -1", "kl_coef is -1.0; it must not be negative"),
        ("--value_model adapter", "value_model adapter shares the base of the policy's adapter; add --use_peft"),
        ("--value_model head", "value_model is 'head'"),
        ("--value_model trunk --value_model_path x", "leave one of them out"),
        ("--reward_model_path {model}", "has no trained reward head; train one with jaxpost reward"),
        ("--reward_model_path {home}/rewards.py", "rewards.py"),
        ("--value_model_path {model}", "has no trained reward head"),
        ("--value_learning_rate -1", "value_learning_rate"),
        ("--reward_weights 1 2", "reward_weights has 2 numbers for 1 reward functions"),
        ("--dynamic_sampling", "dynamic_sampling compares completions of a prompt"),
    ],
)
def test_mistakes_are_named(tiny_folder, home, tmp_path, capsys, flags, message):
    flags = flags.format(model=tiny_folder, home=home)
    assert run(tiny_folder, home, tmp_path / "out", flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
