"""Methods that learn from completions of the policy, by the command line and in Python."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from jaxpost import GRPOConfig, GRPOTrainer, from_pretrained
from jaxpost.cli import main
from jaxpost.errors import RolloutError
from jaxpost.methods import METHODS
from tests.conftest import make_tokenizer
from tests.e2e.test_lora import assert_same
from tests.marks import slow

REWARD = '''
def early(completion_ids, **kwargs):
    """Small ids are good; completions differ in length, some have nothing to be said of."""
    return [None if ids[0] % 11 == 0 else sum(i < 150 for i in ids) / len(ids) for ids in completion_ids]


def half(completion_ids, answer, **kwargs):
    """All completions of every other prompt are equally good."""
    return [0.5 if int(a) % 2 else min(ids) / 300 for ids, a in zip(completion_ids, answer)]
'''
PROMPTS = [{"prompt": "what is " + "x" * (1 + n % 5) + str(n), "answer": str(n)} for n in range(20)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("grpo")
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (home / "rewards.py").write_text(REWARD)
    return home


def run(method, model, home, output_dir, flags=""):
    base = f"{method} --model_name_or_path {model} --dataset_name {home}/prompts.jsonl --output_dir {output_dir}"
    shared = (
        "--report_to none --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 6 "
        "--learning_rate 1e-2 --logging_steps 1 --max_steps 4 --save_steps 2 --lr_scheduler_type constant"
    )
    rewards = f"--reward_funcs {home}/rewards.py:early"
    return main([*base.split(), *shared.split(), *rewards.split(), *flags.split()])


def logged(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def grpo(tiny_folder, home, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "grpo"
    assert run("grpo", tiny_folder, home, out) == 0
    return out


def test_the_policy_learns_and_says_how(grpo):
    log = logged(grpo)
    assert log[-1]["reward"] > log[0]["reward"] + 0.02
    for row in log:
        assert row["sampling/sampling_logp_difference/max"] < 1e-5
        assert {"generation_time", "reward_time", "completions/mean_length", "rewards/early/mean"} <= set(row)
        assert 0 < row["rewards/early/excluded"] < 0.5 and row["rewards/early/failed"] == 0


def test_every_completion_is_kept(grpo):
    files = sorted((grpo / "completions").iterdir())
    assert [file.name for file in files] == [f"completions_{step:05d}.parquet" for step in range(1, 5)]
    table = pq.read_table(files[0]).to_pydict()
    assert len(table["prompt"]) == 32
    groups = np.array(table["advantage"]).reshape(8, 4)
    np.testing.assert_allclose(groups.sum(axis=1), 0, atol=1e-5)
    assert all(a == 0 for a, r in zip(table["advantage"], table["early"], strict=True) if r is None)


@pytest.mark.parametrize(
    "flags",
    [
        slow("--mesh data=2,tensor=4 --per_device_train_batch_size 8 --gradient_accumulation_steps 2"),
        "--mesh fsdp=4,tensor=2 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --rollout_batch_size 4",
    ],
)
def test_layout_changes_nothing(grpo, tiny_folder, home, tmp_path, flags):
    assert run("grpo", tiny_folder, home, tmp_path / "out", flags) == 0
    for ours, theirs in zip(logged(tmp_path / "out"), logged(grpo), strict=True):
        for name in ("reward", "entropy", "grad_norm", "completions/mean_length"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)


def test_resumed_within_a_generation_equals_uninterrupted_bit_for_bit(tiny_folder, home, tmp_path):
    flags = "--num_iterations 2 --steps_per_generation 2 --save_steps 3"
    assert run("grpo", tiny_folder, home, tmp_path / "whole", f"{flags} --beta 0.1") == 0
    for more in ("--max_steps 3", "--resume_from_checkpoint true"):
        assert run("grpo", tiny_folder, home, tmp_path / "parts", f"{flags} --beta 0.1 {more}") == 0
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_resumed_equals_uninterrupted_bit_for_bit(grpo, tiny_folder, home, tmp_path):
    assert run("grpo", tiny_folder, home, tmp_path / "parts", "--max_steps 2") == 0
    assert run("grpo", tiny_folder, home, tmp_path / "parts", "--resume_from_checkpoint true") == 0
    assert_same(weights(tmp_path / "parts"), weights(grpo))


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        slow("grpo", "--loss_type dapo --per_device_train_batch_size 8"),
        ("grpo", "--loss_type grpo --scale_rewards batch"),
        slow("rloo", "--beta 0"),
    ],
)
def test_completions_that_are_rewarded_alike_are_not_read_and_change_nothing(
    tiny_folder, home, tmp_path, monkeypatch, method, flags
):
    flags += f" --reward_funcs {home}/rewards.py:half --save_strategy no --max_steps 2"
    assert run(method, tiny_folder, home, tmp_path / "ours", flags) == 0
    monkeypatch.setattr(METHODS[method].objective, "needs_equal_rewards", True)
    assert run(method, tiny_folder, home, tmp_path / "all", flags) == 0
    for ours, theirs in zip(logged(tmp_path / "ours"), logged(tmp_path / "all"), strict=True):
        assert ours["num_tokens"] < 0.8 * theirs["num_tokens"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], atol=1e-6)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("grpo", "--num_iterations 2 --generation_batch_size 64 --beta 0.1 --save_steps 4"),
        slow("grpo", "--dynamic_sampling --use_adaptive_entropy --top_entropy_quantile 0.8"),
        (
            "grpo",
            "--loss_type cispo --epsilon_high 5 --beta 0.1 --use_peft --lora_r 4 --lora_dropout 0",
        ),
        ("rloo", "--top_k 100 --top_p 0.95 --min_p 0.01 --repetition_penalty 1.1"),
        slow("rloo", "--baseline batch --beta 0 --steps_per_generation 2"),
        ("grpo", "--generate_ahead true --loss_type vespo"),
    ],
)
def test_other_ways_to_train(tiny_folder, home, tmp_path, method, flags):
    assert run(method, tiny_folder, home, tmp_path / "out", f"{flags} --save_strategy no") == 0
    log = logged(tmp_path / "out")
    assert all(np.isfinite(value) for row in log for value in row.values())
    assert any(row["grad_norm"] > 0 for row in log)
    if "--top_k" not in flags and "ahead" not in flags:  # the first of which the sampler sees and the trainer does not
        assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in log)


def test_python_face_with_functions_evaluation_and_a_reward_that_says_nothing(tiny_folder, tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=["none"],
        eval_strategy="steps",
        num_generations_eval=1,
        reward_weights=[1.0, 0.5],
    )
    trainer = GRPOTrainer(
        from_pretrained(tiny_folder),
        reward_funcs=[lambda completion_ids, **_: [len(ids) for ids in completion_ids], nothing],
        args=args,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:3],
        processing_class=make_tokenizer(),
    )
    metrics = trainer.train()
    assert metrics["eval_rewards/<lambda>/mean"] > 1 and metrics["rewards/nothing/excluded"] == 1
    assert trainer.evaluate(PROMPTS[:5])["eval_completions/max_length"] <= 4


def nothing(completions, **_):
    """A reward that does not apply."""
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--num_generations 1", 2, "num_generations is 1"),
        ("--num_generations 5", 2, "a generation has 32 completions; that must be a multiple of num_generations, 5"),
        ("--reward_funcs numeric", 2, "no function 'numeric'"),
        ("--reward_weights 1 2", 2, "reward_weights has 2 numbers for 1 reward functions"),
        ("--max_completion_length 4000", 2, "max_completion_length is 4000, but the model reads"),
        ("--temperature 0", 2, "temperature is 0.0; it must be above 0"),
        ("--loss_type cispo", 2, "cispo: epsilon_high is the greatest weight of a token"),
        ("--precompute_ref_log_probs", 2, "completions are not known in advance"),
    ],
)
def test_mistakes_are_named(tiny_folder, home, tmp_path, capsys, flags, code, message):
    assert run("grpo", tiny_folder, home, tmp_path / "out", flags) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_it_is_evaluated_in_a_run(tiny_folder, home, capsys):
    words = f"evaluate grpo --model_name_or_path {tiny_folder} --dataset_name {home}/prompts.jsonl"
    assert main(words.split()) == 2
    assert "grpo is measured in a run" in capsys.readouterr().err


def test_a_prompt_without_room_is_named_or_left_out(tiny_folder, home, tmp_path, capsys):
    rows = [*PROMPTS[:8], {"prompt": "long " * 2000, "answer": "0"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--dataset_name {tmp_path}/prompts.jsonl --max_steps 1"
    assert run("grpo", tiny_folder, home, tmp_path / "out", flags) == 3
    assert "prompts.jsonl, row 9: the prompt has" in capsys.readouterr().err
    assert run("grpo", tiny_folder, home, tmp_path / "out", f"{flags} --on_bad_row skip") == 0


def test_a_reward_that_always_fails_ends_the_run(tiny_folder, home, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(completions, **kwargs):\n    raise KeyError('lost')\n")
    flags = f"--reward_funcs {tmp_path}/bad.py:bad"
    assert run("grpo", tiny_folder, home, tmp_path / "out", flags) == 3
    assert "reward function bad fails for 32 of 32 completions" in capsys.readouterr().err


ROLLOUT = '''
def plain(prompts, trainer):
    """What the policy answers; the reward functions are told its number."""
    ids = [trainer.encode(prompt) for prompt in prompts]
    answers = trainer.generate(ids, num_return_sequences=trainer.num_generations)
    each = [i for i in ids for _ in range(trainer.num_generations)]
    return {
        "prompt_ids": each,
        "completion_ids": [answer.tokens for answer in answers],
        "logprobs": [answer.logps for answer in answers],
        "number": list(range(len(answers))),
    }


def two_turns(prompts, trainer):
    """Three tokens, two that it is told, three more."""
    ids = [trainer.encode(prompt) for prompt in prompts]
    first = trainer.generate(ids, num_return_sequences=trainer.num_generations, max_new_tokens=3)
    each = [i for i in ids for _ in range(trainer.num_generations)]
    told = [[*prompt, *answer.tokens, 40, 41] for prompt, answer in zip(each, first)]
    second = trainer.generate(told, max_new_tokens=3)
    return {
        "prompt_ids": each,
        "completion_ids": [a.tokens + [40, 41] + b.tokens for a, b in zip(first, second)],
        "logprobs": [a.logps + [0.0, 0.0] + b.logps for a, b in zip(first, second)],
        "env_mask": [[1] * len(a.tokens) + [0, 0] + [1] * len(b.tokens) for a, b in zip(first, second)],
        "number": list(range(len(first))),
    }
'''


@pytest.mark.parametrize("method", ["grpo", slow("rloo")])
def test_a_rollout_of_several_turns_is_learned_from_where_the_policy_spoke(method, tiny_folder, home, tmp_path):
    (home / "rollout.py").write_text(ROLLOUT)
    flags = f"--rollout_func {home}/rollout.py:two_turns"
    assert run(method, tiny_folder, home, tmp_path / "whole", flags) == 0
    log = logged(tmp_path / "whole")
    # The model that trains says of every token, told ones in between, what the one that sampled said.
    assert max(row["sampling/sampling_logp_difference/max"] for row in log) < 1e-5
    assert all(row["completions/max_length"] <= 6 for row in log)
    assert run(method, tiny_folder, home, tmp_path / "resumed", f"{flags} --max_steps 2") == 0
    assert run(method, tiny_folder, home, tmp_path / "resumed", f"{flags} --resume_from_checkpoint true") == 0
    assert_same(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


def test_rollout_functions_in_python_and_bad_ones(tiny_folder, home, tmp_path, capsys):
    (home / "rollout.py").write_text(ROLLOUT)
    numbers = []

    def reward(completion_ids, number, **kwargs):
        numbers.extend(number)
        return [float(i) for i in number]

    def three(prompts, trainer):
        return {"prompt_ids": [[5]], "completion_ids": [[6]], "logprobs": [[-1.0]]}

    args = {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6}
    config = GRPOConfig(output_dir=str(tmp_path / "python"), report_to=["none"], **args)
    options = {"reward_funcs": reward, "train_dataset": PROMPTS}
    GRPOTrainer(str(tiny_folder), args=config, rollout_func=f"{home}/rollout.py:plain", **options).train()
    assert numbers == list(range(32))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "bad"))
    with pytest.raises(RolloutError, match="rollout_func three: prompt_ids has 1 entries, but 8 prompts x"):
        GRPOTrainer(str(tiny_folder), args=config, rollout_func=three, **options).train()
    assert run("grpo", tiny_folder, home, tmp_path / "none", "--rollout_func none.py:f") == 2
    assert "rollout_func is 'none.py:f'; give file.py:function" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "flags"),
    [("grpo", ""), slow("grpo", "--steps_per_generation 2 --dynamic_sampling true"), slow("rloo", "--beta 0")],
)
def test_completions_sampled_ahead_are_weighted_and_survive_a_restart(method, flags, tiny_folder, home, tmp_path):
    flags = f"{flags} --generate_ahead true --importance_sampling_cap 1.5 --save_steps 1 --max_steps 5"
    assert run(method, tiny_folder, home, tmp_path / "whole", flags) == 0
    log = logged(tmp_path / "whole")
    size = 2 if "steps_per" in flags else 1
    assert log[0]["sampling/sampling_logp_difference/max"] < 1e-5  # nothing was there before the first
    for row in log[size:]:
        assert row["sampling/sampling_logp_difference/max"] > 1e-4
        ratio = [row[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")]
        assert ratio == sorted(ratio) and ratio[0] < ratio[2] <= 1.5
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    assert run(method, tiny_folder, home, tmp_path / "resumed", f"{flags} --resume_from_checkpoint 3") == 0
    again = logged(tmp_path / "resumed")
    assert [row["loss"] for row in again] == [row["loss"] for row in log]
    assert_same(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


def test_a_rollout_function_cannot_be_ahead(tiny_folder, home, tmp_path, capsys):
    (home / "rollout.py").write_text(ROLLOUT)
    flags = f"--rollout_func {home}/rollout.py:plain --generate_ahead true"
    assert run("grpo", tiny_folder, home, tmp_path / "out", flags) == 2
    assert "generate_ahead cannot keep what a rollout_func returns" in capsys.readouterr().err
