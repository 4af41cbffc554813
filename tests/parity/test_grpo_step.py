"""The first steps of GRPO and RLOO on given completions against TRL's trainers: rewards, advantages, loss, gradient."""

import json
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxpost.cli import main
from jaxpost.rl.generate import Completion
from tests.conftest import make_tokenizer
from tests.parity.test_preference_step import DEVICES, assert_same, folders, said  # noqa: F401

pytest.importorskip("trl")
pytestmark = pytest.mark.parity

GENERATIONS, PROMPTS = 4, 8
END = 1
LEFT_OUT = ("num_tokens", "completions/min_terminated_length", "completions/max_terminated_length", "tokens_per_second")
REWARDS = '''
def vowels(completions, **kwargs):
    """Something that differs."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / 4 for text in texts]


def picky(completion_ids, level, **kwargs):
    """Has nothing to say of some, and scores that depend on a column of the dataset."""
    return [None if len(ids) % 3 == 0 else len(ids) * factor for ids, factor in zip(completion_ids, level)]
'''


def rows(conversational):
    questions = [f"What is {n} + {n}?" + " Think." * (n % 3) for n in range(PROMPTS)]
    return [
        {"prompt": said(question, "user") if conversational else question, "level": 0.1 + n / 10}
        for n, question in enumerate(questions)
    ]


def answers(prompt, count):
    """Completions of a prompt, the same for both: ids, some of them not ended."""
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    rng = np.random.default_rng(len(text) + ord(text[8]))
    found = []
    for i in range(count):
        ids = rng.integers(40, 120, rng.integers(2, 9)).tolist()
        found.append(ids if i % 3 == 2 else [*ids, END])
    return found


def our_log(method, folders, data, out, tmp_path, **changes):  # noqa: F811
    """What jaxpost logs, and the advantage of each completion by its prompt and ids."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARDS)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    flags = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": GENERATIONS, "logging_steps": 1}
    flags |= {"save_strategy": "no", "report_to": "none", "max_completion_length": 9, **changes}
    flags |= {"output_dir": out, "dataset_name": path, "reward_funcs": [f"{rewards}:vowels", f"{rewards}:picky"]}
    policy, reference = folders
    words = [method, "--model_name_or_path", str(policy), "--ref_model_name_or_path", str(reference)]
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    tokenizer = make_tokenizer()

    def given(model, prompts, *, num_return_sequences, **_):
        found = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            [row] = [row for row in data if question(row) in text and f"{question(row)} " not in text]
            found += [
                Completion(ids, [0.0] * len(ids), ids[-1] == END)
                for ids in answers(row["prompt"], num_return_sequences)
            ]
        return found

    with patch("jaxpost.record.write_curves"), patch("jaxpost.online.generate", given):
        assert main(words) == 0
    table = pq.read_table(next((out / "completions").iterdir())).to_pydict()
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return log, sorted(zip(table["vowels"], table["advantage"], strict=True))


def question(row):
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]


def trl_log(method, folders, data, out, **changes):  # noqa: F811
    """What TRL logs, and its advantages."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    functions: dict = {}
    exec(REWARDS, functions)
    policy, reference = folders
    config_class, trainer_class = {
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[method]
    args = config_class(
        output_dir=str(out),
        logging_steps=1,
        per_device_train_batch_size=4 * DEVICES,
        num_generations=GENERATIONS,
        max_completion_length=9,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        **{"max_steps": 1, **changes},
    )
    tokenizer = AutoTokenizer.from_pretrained(policy)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(policy),
        reward_funcs=[functions["vowels"], functions["picky"]],
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(reference).state_dict())
    counts: dict = {}

    def given(prompt_ids, *_, **__):
        found = []
        for ids in prompt_ids:
            text = tokenizer.decode(ids)
            [row] = [row for row in data if question(row) in text and f"{question(row)} " not in text]
            number = counts[question(row)] = counts.get(question(row), -1) + 1
            found.append(answers(row["prompt"], GENERATIONS)[number])
        return (found, None) if method == "grpo" else found

    trainer._generate_single_turn = given
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    return log, sorted(zip(trainer._logs["rewards"]["vowels"], trainer._logs["advantages"], strict=True))


@pytest.mark.parametrize(
    ("method", "conversational", "flags"),
    [
        pytest.param("grpo", True, {}, id="defaults"),
        pytest.param("grpo", False, {"beta": 0.2, "loss_type": "grpo"}, id="reference"),
        pytest.param(
            "grpo",
            True,
            {"scale_rewards": "batch", "reward_weights": [0.5, 2.0], "loss_type": "dr_grpo", "temperature": 0.7},
            id="dr_grpo",
        ),
        pytest.param(
            "grpo",
            False,
            {"multi_objective_aggregation": "normalize_then_sum", "mask_truncated_completions": True, "beta": 0.1},
            id="gdpo, truncated ones masked",
        ),
        pytest.param("grpo", False, {"scale_rewards": "none", "importance_sampling_level": "sequence"}, id="gspo"),
        pytest.param("grpo", False, {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-3}, id="two iterations"),
        pytest.param("grpo", False, {"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, id="entropy"),
        pytest.param("rloo", True, {}, id="rloo"),
        pytest.param(
            "rloo", False, {"normalize_advantages": True, "reward_clip_range": [0.1, 0.9]}, id="rloo, clipped"
        ),
    ],
)
def test_first_steps_equal_trl(method, conversational, flags, folders, tmp_path):  # noqa: F811
    data = rows(conversational)
    ours, our_advantages = our_log(method, folders, data, tmp_path / "ours", tmp_path, **flags)
    theirs, their_advantages = trl_log(method, folders, data, tmp_path / "theirs", **flags)
    assert len(ours) == len(theirs) == flags.get("max_steps", 1)
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other, LEFT_OUT)
    np.testing.assert_allclose(our_advantages, their_advantages, rtol=1e-6, atol=1e-6)
