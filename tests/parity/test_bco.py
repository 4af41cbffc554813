"""The first steps of BCO against TRL 1.10, the last that has it; it is installed beside the newer one for this test."""

import json
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import BCOConfig, BCOTrainer
from jaxpost.objectives.bco_losses import bco_loss
from jaxpost.objectives.density_ratio import density_ratio, fit_classifier
from tests.parity.older_trl import run
from tests.parity.test_preference_step import JUDGED, our_log, write_model

pytestmark = pytest.mark.parity
STEPS = 3

# What both embed prompts by, a function of texts.
EMBEDDING = """
import numpy as np

def embed(texts):
    letters = np.array([[text.count(letter) for letter in "aek138+"] for text in texts], np.float32)
    return letters / (1 + letters.sum(axis=1, keepdims=True)) * 8
"""
# TRL hands it tokens. It draws prompts with repetition, and here takes each once as we do; its classifier is fitted in
# float32 and not to the end, which shows in the fourth digit of rewards after two steps.
WEIGHTED = f"""{EMBEDDING}
import torch
import trl.experimental.bco.bco_trainer as module
from sklearn.linear_model import LogisticRegression

class Exact(LogisticRegression):
    def fit(self, points, labels):
        return super().fit(points.astype(np.float64), labels)

def options(tokenizer):
    def embed_tokens(input_ids, attention_mask):
        rows = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        texts = [tokenizer.decode([id for id, there in zip(*row, strict=True) if there]) for row in rows]
        return torch.from_numpy(embed(texts))

    np.random.choice = lambda count, size: np.arange(count)[: size[0]]
    module.LogisticRegression = lambda **given: Exact(**given, tol=1e-10, max_iter=1000)
    return {{"embedding_func": embed_tokens, "embedding_tokenizer": tokenizer}}
"""
PLAIN = "options = lambda tokenizer: {}"
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
    **options(tokenizer),
)
trainer.train()
print(json.dumps([row for row in trainer.state.log_history if "loss" in row]))
"""


LOSS = """
import functools, json, sys, types
import torch
from sklearn.linear_model import LogisticRegression
from trl.experimental.bco import BCOTrainer

logps, reference, chosen, shift, beta, embeddings = json.loads(sys.argv[1])
leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
reference = torch.tensor(reference, dtype=torch.float64)
running = types.SimpleNamespace(update=lambda rewards: None, mean=torch.tensor(shift, dtype=torch.float64))
trainer = types.SimpleNamespace(beta=beta, running=running, match_underlying_distribution=embeddings is not None)
sides = [side for part in (leaf, reference) for side in (part[:chosen], part[chosen:])]
points = [None, None]
if embeddings is not None:
    embeddings = torch.tensor(embeddings, dtype=torch.float64)
    points = [embeddings[:chosen], embeddings[chosen:]]
    classifier = LogisticRegression(class_weight="balanced", tol=1e-12, max_iter=1000)
    classifier.fit(embeddings.numpy(), torch.arange(len(leaf)).numpy() < chosen)
    probability = lambda points: torch.from_numpy(classifier.predict_proba(points.numpy())[:, 1])
    trainer._get_chosen_prob = probability
    trainer.args = types.SimpleNamespace(min_density_ratio=0.8, max_density_ratio=1.4)
    trainer._get_udm_weight = functools.partial(BCOTrainer._get_udm_weight, trainer)
losses = BCOTrainer.bco_loss(trainer, *sides, *points)[0]
losses.mean().backward()
print(json.dumps([losses.mean().item(), leaf.grad.tolist()]))
"""


ROWS = [
    {"prompt": row["prompt"][0]["content"], "completion": row["completion"][0]["content"], "label": row["label"]}
    for row in JUDGED
]
SHARED = {"max_steps": STEPS, "max_length": 256, "learning_rate": 1e-3, "beta": 0.2}


@pytest.fixture
def folders(tmp_path):
    return write_model(tmp_path / "policy", 0), write_model(tmp_path / "reference", 1)


def trl_log(script, trl, folders, output_dir, **settings):
    settings = json.dumps({**SHARED, **settings, "per_device_train_batch_size": 8})
    return run(script + STEPPING, trl, *folders, json.dumps(ROWS), output_dir, settings)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) == STEPS
    names = ["loss", "delta", *(f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected"))]
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in [*names, "rewards/margins", "grad_norm"]:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=f"{name} of step {step}")
    assert len({row["delta"] for row in ours}) == STEPS


def test_first_steps_equal_trl(older_trl, folders, tmp_path):
    ours = our_log("bco", folders, ROWS, tmp_path / "ours", per_device_train_batch_size=1, **SHARED)
    assert_same(ours, trl_log(PLAIN, older_trl, folders, tmp_path / "theirs"))


def test_first_steps_equal_trl_where_prompts_are_weighed(older_trl, folders, tmp_path):
    ratios = {"min_density_ratio": 0.7, "max_density_ratio": 1.6}
    policy, reference = map(str, folders)
    settings = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "tokenized_cache_dir": ""}
    settings |= {"train_sampling_strategy": "sequential", "pad_to_multiple_of": 512, **SHARED, **ratios}
    args, names = BCOConfig(tmp_path / "ours", per_device_train_batch_size=1, **settings), {}
    exec(EMBEDDING, names)
    trainer = BCOTrainer(policy, reference, args, ROWS, embedding_func=names["embed"])
    weights = trainer.feed.loader.packs.facts["weight"]
    assert len({*weights.tolist()} - {1.0}) > 3 and weights.min() == np.float32(0.7) < weights.max()
    with patch("jaxpost.record.write_curves"):
        trainer.train()
    ours = trainer.state.log_history
    assert_same(ours, trl_log(WEIGHTED, older_trl, folders, tmp_path / "theirs", **ratios))
    assert ours[0]["loss"] != pytest.approx(np.log(2), rel=1e-2)


@pytest.mark.parametrize("is_weighed", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_loss_and_gradient_equal_trl_in_float64(older_trl, shift, is_weighed):
    rng, chosen, beta = np.random.default_rng(8), 3, 0.3
    logps, reference = rng.normal(-20, 6, (2, 8))
    label, points, weight = np.arange(8) < chosen, None, 1.0
    if is_weighed:
        points = rng.normal(size=(8, 4))
        ratio = density_ratio(fit_classifier(points, label).log_odds(points), 0.8, 1.4)
        weight = np.where(label, 1.0, ratio)
        assert len({*weight.tolist()} - {1.0, 0.8, 1.4}) > 0

    def ours(logps):
        rewards, labels = beta * (logps - reference), jnp.asarray(label, logps.dtype)
        return jnp.mean(bco_loss(rewards, jnp.asarray(shift), labels, jnp.asarray(weight, logps.dtype)))

    given = [logps.tolist(), reference.tolist(), chosen, shift, beta, points if points is None else points.tolist()]
    value, gradient = run(LOSS, older_trl, json.dumps(given))
    with jax.enable_x64(True):
        found, slope = jax.value_and_grad(ours)(jnp.asarray(logps))
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5)
