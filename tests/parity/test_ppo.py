"""PPO against TRL 1.10, the last that has it: its functions, and a whole update of its trainer on given completions."""

import json
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpost.cli import main
from jaxpost.objectives.ppo_losses import kl_estimate, whitened
from jaxpost.rl.generate import Completion
from tests.conftest import make_tokenizer
from tests.parity.older_trl import run
from tests.parity.test_preference_step import write_model

pytestmark = pytest.mark.parity

END, LONGEST = 1, 9
PROMPTS = [f"What is {n} + {n}?" + " Think." * (n % 3) for n in range(8)]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
RATE = 1e-3
REWARD = '''
def judged(completion_ids, **kwargs):
    """Something that differs."""
    return [(sum(ids) % 7) / 3 - 1 for ids in completion_ids]
'''

FUNCTIONS = """
import json, sys
import torch
from trl.experimental.ppo.ppo_trainer import masked_mean, masked_whiten

values, mask = (torch.tensor(x, dtype=torch.float64) for x in json.loads(sys.argv[1]))
print(json.dumps([masked_mean(values, mask > 0).item(), masked_whiten(values, mask > 0).tolist(),
                  masked_whiten(values, mask > 0, shift_mean=False).tolist()]))
"""

UPDATE = """
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

policy, reference, value, output, given, settings = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
given = {tuple(tokenizer(prompt)["input_ids"]): ids for prompt, ids in json.loads(given).items()}
pad, temperature = tokenizer.pad_token_id, 0.7
judge = AutoModelForSequenceClassification.from_pretrained(value, num_labels=1)
own_reward = ppo_trainer.get_reward


def completed(model, queries, size, pad_id, config):
    found = [given[tuple(i for i in query.tolist() if i != pad)] for query in queries]
    length = max(map(len, found))
    responses = torch.tensor([ids + [pad] * (length - len(ids)) for ids in found])
    both = torch.cat([queries, responses], dim=1)
    logits = ppo_trainer.forward(model, both, pad).logits[:, queries.shape[1] - 1 : -1] / (temperature + 1e-7)
    return both, logits


def reward(model, both, pad_id, context):
    if model is not judge:
        return own_reward(model, both, pad_id, context)
    ids = [[i for i in row.tolist() if i != pad] for row in both[:, context:]]
    return None, torch.tensor([(sum(row) % 7) / 3 - 1 for row in ids]), None


ppo_trainer.batch_generation, ppo_trainer.get_reward = completed, reward
rows = Dataset.from_list([{"input_ids": list(ids)} for ids in given])
args = PPOConfig(output_dir=output, per_device_train_batch_size=8, total_episodes=8, num_sample_generations=0,
                 response_length=9, stop_token="eos", logging_steps=1, bf16=False, gradient_checkpointing=False,
                 use_cpu=True, report_to=[], save_strategy="no", **json.loads(settings))
trainer = PPOTrainer(
    args=args,
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(policy),
    ref_model=AutoModelForCausalLM.from_pretrained(reference),
    reward_model=judge,
    value_model=AutoModelForSequenceClassification.from_pretrained(value, num_labels=1),
    train_dataset=rows,
    eval_dataset=rows,
)
trainer.train()
trainer.policy_model.save_pretrained(output + "/policy")
trainer.value_model.save_pretrained(output + "/value")
print(json.dumps([row for row in trainer.state.log_history if "objective/kl" in row][0]))
"""


def test_functions_equal_trl_in_float64(older_trl):
    rng = np.random.default_rng(4)
    values, mask = rng.normal(2, 3, (5, 7)), rng.random((5, 7)) < 0.6
    mean, white, unshifted = run(FUNCTIONS, older_trl, json.dumps([values.tolist(), mask.astype(float).tolist()]))
    with jax.enable_x64(True):
        found = [whitened(jnp.asarray(values), jnp.asarray(mask), shift_mean=shift) for shift in (True, False)]
        for ours, theirs in zip(found, (white, unshifted), strict=True):
            np.testing.assert_allclose(np.asarray(ours)[mask], np.array(theirs)[mask], rtol=1e-6)
        logps, reference = jnp.asarray(-rng.random((2, 9)) * 5)
        ratio = reference - logps  # TRL has these formulas in the midst of its loop
        np.testing.assert_allclose(kl_estimate(logps, reference, "k1"), -ratio, rtol=1e-9)
        np.testing.assert_allclose(kl_estimate(logps, reference, "k3"), np.exp(ratio) - 1 - ratio, rtol=1e-9)
    np.testing.assert_allclose(values[mask].mean(), mean, rtol=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a reference and a value model with weights of their own."""
    home = tmp_path_factory.mktemp("models")
    return [
        write_model(home / "policy", 0),
        write_model(home / "reference", 1),
        write_model(home / "value", 2, head="reward"),
    ]


def completions(ragged):
    """For each prompt; the last fills all the room, as all do that are not ragged."""
    rng, found = np.random.default_rng(7), {}
    for number, prompt in enumerate(PROMPTS):
        length = int(rng.integers(2, LONGEST)) if ragged and number < len(PROMPTS) - 1 else LONGEST
        ids = rng.integers(40, 120, length).tolist()
        found[prompt] = [*ids[:-1], END] if length < LONGEST or number % 2 == 0 else ids
    return found


def our_update(folders, given, out, tmp_path, **changes):
    """What jaxpost logs of the steps of one generation."""
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    policy, reference, value = folders
    flags = {"model_name_or_path": policy, "ref_model_name_or_path": reference, "value_model_path": value}
    flags |= {"dataset_name": tmp_path / "rows.jsonl", "reward_funcs": f"{tmp_path}/rewards.py:judged"}
    flags |= {"per_device_train_batch_size": 1, "max_completion_length": LONGEST, "output_dir": out, "max_grad_norm": 0}
    flags |= {"max_steps": changes["num_ppo_epochs"], "logging_steps": changes["num_ppo_epochs"], "report_to": "none"}
    flags |= {"save_strategy": "no", "lr_scheduler_type": "constant", **changes}
    tokenizer = make_tokenizer()

    def chosen(model, prompts, **_):
        texts = [given[tokenizer.decode(ids)] for ids in prompts]
        return [Completion(ids, [0.0] * len(ids), ids[-1] == END) for ids in texts]

    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with patch("jaxpost.record.write_curves"), patch("jaxpost.online.generate", chosen):
        assert main(["ppo", *words]) == 0
    [row] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return row


def without_padding(theirs, tokens):
    """TRL's log, where two of its means count padding, as tokens on which nothing has moved."""
    places = len(PROMPTS) * LONGEST
    ratio = (theirs["val/ratio"] * places - (places - tokens)) / tokens
    return {**theirs, "val/ratio": ratio, "policy/approxkl_avg": theirs["policy/approxkl_avg"] * places / tokens}


@pytest.mark.parametrize(
    ("ragged", "flags"),
    [
        pytest.param(True, {"missing_eos_penalty": 1.0}, id="ragged"),
        pytest.param(
            False,
            {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.97, "kl_coef": 0.3, "cliprange_value": 0.01},
            id="of one length",
        ),
    ],
)
def test_an_update_equals_trl(older_trl, folders, tmp_path, ragged, flags):
    given = completions(ragged)
    shared = {"num_ppo_epochs": 3, "learning_rate": RATE, "vf_coef": 0.5, **flags}
    ours = our_update(folders, given, tmp_path / "ours", tmp_path, **shared)
    theirs = run(UPDATE, older_trl, *folders, tmp_path / "theirs", json.dumps(given), json.dumps(shared))
    theirs = without_padding(theirs, sum(map(len, given.values())))
    names = {name for name in theirs if name.partition("/")[0] in ("objective", "policy", "loss", "val")}
    assert names < ours.keys() and len(names) == 14
    names -= {"val/ratio_var", *(["policy/entropy_avg"] if ragged else [])}
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert ours["policy/approxkl_avg"] > 1e-3 and ours["val/ratio"] != 1
    for start, mine, other in (
        (folders[0], "", "policy"),
        (folders[2], "value_model", "value"),
    ):
        before, after, expected = (
            load_file(folder / "model.safetensors")
            for folder in (start, tmp_path / "ours" / mine, tmp_path / "theirs" / other)
        )
        off = np.sqrt(sum(np.sum((after[name] - expected[name]) ** 2) for name in before if name in expected))
        moved = np.sqrt(sum(np.sum((after[name] - before[name]) ** 2) for name in before if name in expected))
        assert moved > 0 and off < 1e-2 * moved, (mine, off, moved)
