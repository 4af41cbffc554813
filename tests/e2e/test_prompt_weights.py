"""BCO that weighs undesirable examples by their prompts, by the command line and in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import BCOConfig, BCOTrainer, from_pretrained
from jaxpost.cli import main
from jaxpost.errors import ConfigError
from jaxpost.objectives.density_ratio import density_ratio, fit_classifier
from jaxpost.prompt_embeddings import mean_states
from jaxpost.sharding import make_mesh
from tests.conftest import make_tokenizer
from tests.e2e.test_evaluation import evaluated
from tests.e2e.test_preference import jsonl, run

LOG_2 = float(np.log(2))
ROWS = [
    {"prompt": ("ask " if i % 2 or label else "tell") * (1 + i % 5), "completion": f"{i}" * (1 + i % 3), "label": label}
    for i, label in enumerate([True, False, False] * 8)
]
RATIOS = {"min_density_ratio": 0.1, "max_density_ratio": 3.0}
FLAGS = " ".join(f"--{name} {value}" for name, value in RATIOS.items())
ALL_AT_ONCE = "--per_device_train_batch_size 3 --eval_strategy steps --eval_steps 2"
SETTINGS = {"per_device_train_batch_size": 3, "report_to": "none", "logging_steps": 1, "tokenized_cache_dir": ""}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    jsonl(folder / "train.jsonl", ROWS)
    jsonl(folder / "test.jsonl", ROWS[4:10])
    return folder


def expected_weights(folder):
    """What the rows weigh, of the mean hidden states of each prompt alone."""
    model, tokenizer = from_pretrained(folder), make_tokenizer()

    def mean_state(text):
        tokens = jnp.array([tokenizer(text)["input_ids"]])
        h, _ = model.hidden(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
        return np.asarray(h[0], np.float64).mean(axis=0)

    points, labels = np.stack([mean_state(row["prompt"]) for row in ROWS]), np.array([row["label"] for row in ROWS])
    ratios = density_ratio(fit_classifier(points, labels).log_odds(points), *RATIOS.values())
    return np.where(labels, 1.0, ratios)


def test_a_model_embeds_prompts(tiny_folder, data, tmp_path, capsys):
    flags = f"--embedding_model {tiny_folder} {FLAGS} {ALL_AT_ONCE}"
    assert run("bco", tiny_folder, data, tmp_path / "out", flags) == 0
    assert "weights of 16 undesirable examples: from 0." in capsys.readouterr().out
    weights, losses = expected_weights(tiny_folder), evaluated(tmp_path / "out", "loss")
    assert len({*weights.tolist()}) > 4
    assert losses[0] == pytest.approx(LOG_2 * weights.mean(), rel=1e-5)  # the policy is the reference yet
    assert losses[-1] < losses[0]
    # Another layout makes no difference, and neither does an evaluation from which rows are left out.
    mesh = "--mesh data=2,tensor=4 --per_device_train_batch_size 4 --gradient_accumulation_steps 3"
    assert run("bco", tiny_folder, data, tmp_path / "mesh", f"{flags} {mesh} --padding_free false") == 0
    for name in ("loss", "eval_loss"):
        np.testing.assert_allclose(evaluated(tmp_path / "mesh", name), evaluated(tmp_path / "out", name), rtol=2e-5)


def test_states_of_texts_do_not_depend_on_their_neighbours(tiny_folder):
    model, mesh = from_pretrained(tiny_folder), make_mesh(devices=jax.local_devices()[:1])
    texts = ["a", "", "some words", "more of them, and so on"]
    together, alone = (
        np.concatenate([mean_states(model, make_tokenizer(), part, batch_size=4, mesh=mesh) for part in parts])
        for parts in ([texts], [[text] for text in texts])
    )
    assert together.shape == (4, 32) and np.isfinite(together).all()
    np.testing.assert_allclose(together, alone, atol=1e-6)


def lengths(texts):
    return np.array([[len(text), text.count("k")] for text in texts], float) / 8


def others(texts):
    return np.array([[text.count("l") + 0.1 * len(text)] for text in texts])


def trainer_of(folder, out, function, **changes):
    args = BCOConfig(out, **{**SETTINGS, **RATIOS, "lr_scheduler_type": "constant", "max_steps": 2, **changes})
    return BCOTrainer(str(folder), args=args, train_dataset=ROWS, eval_dataset=ROWS[4:10], embedding_func=function)


def test_a_function_embeds_prompts_and_a_run_goes_on_with_the_same_alone(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder, tmp_path / "out", lengths, eval_strategy="steps", eval_steps=1)
    weights = trainer.feed.loader.packs.facts["weight"]
    metrics = trainer.train()
    assert evaluated(tmp_path / "out", "loss")[0] == pytest.approx(LOG_2 * weights.mean(), rel=1e-5)
    assert trainer.evaluate(ROWS[4:10])["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    with pytest.raises(ConfigError, match="mean weight of undesirable examples was "):
        trainer_of(tiny_folder, tmp_path / "out", others, max_steps=3).train()
    with pytest.raises(ConfigError, match=r"mean weight of undesirable examples was .*, is None"):
        trainer_of(tiny_folder, tmp_path / "out", None, max_steps=3).train()
    assert trainer_of(tiny_folder, tmp_path / "out", lengths, max_steps=3).train().global_step == 3


def test_mistakes_are_one_line(tiny_folder, data, tmp_path, capsys):
    for flags, message in (
        ("--embedding_model ./nowhere", "nowhere"),
        (
            f"--embedding_model {tiny_folder} --min_density_ratio 3 --max_density_ratio 2",
            "not below min_density_ratio 3",
        ),
    ):
        assert run("bco", tiny_folder, data, tmp_path / "out", flags) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("jaxpost: ") and "\n" not in error and message in error
    assert not (tmp_path / "out").exists()


def test_an_evaluation_without_a_run_says_that_it_has_no_weights(tiny_folder, data, capsys):
    words = f"evaluate bco --model_name_or_path {tiny_folder} --ref_model_name_or_path {tiny_folder}"
    assert main(f"{words} --dataset_name {data} --embedding_model {tiny_folder}".split()) == 0
    assert (
        "embedding_model: weights are learned from the prompts of a run; this loss has none" in capsys.readouterr().out
    )
