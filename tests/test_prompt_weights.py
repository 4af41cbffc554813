"""Weights of undesirable examples by their prompts: what they are, and what cannot be made of embeddings."""

import numpy as np
import pytest

from jaxpost import BCOConfig, BCOTrainer
from jaxpost.data.completions import encode_judged
from jaxpost.data.examples import LengthConfig, flattened
from jaxpost.data.loader import Loader
from jaxpost.data.packing import units
from jaxpost.data.store import stored
from jaxpost.errors import ConfigError, DataError
from jaxpost.objectives.density_ratio import fit_classifier
from jaxpost.prompt_weights import Embedder, PromptWeights, identity
from tests.conftest import make_tokenizer

ROWS = [
    {"prompt": "long " * (i % 4) if label else "ab" * (1 + i % 5), "completion": f"say {i}", "label": label}
    for i, label in enumerate([True, False, False] * 8)
]
ROWS = [{**row, "prompt": "q" + row["prompt"]} for row in ROWS]


def embed(texts):
    return [[len(text), text.count("o")] for text in texts]


def loader_of(rows):
    store = stored(flattened(encode_judged(rows, make_tokenizer(), LengthConfig(), vocab_size=320)))
    shape = {"global_batch_size": len(rows), "num_rows": 4, "num_steps": 1, "num_lengths": 1, "multiple": 8}
    options = {"pad_id": 0, "seed": 0, "sampling": "sequential"}
    return Loader(units(store, 1, {"label": store.values}), **shape, **options)


def weighed(rows=ROWS, function=embed, at_once=5, **changes):
    """(weights of the examples, note) of rows that are trained on."""
    loader, embedder = loader_of(rows), Embedder(function, at_once)
    weights = PromptWeights(BCOConfig(**changes), make_tokenizer(), embedder, loader.packs.examples)
    weights.tell(loader, embedder)
    return loader.packs.facts["weight"], weights.note(loader)


def test_undesirable_examples_weigh_as_much_as_their_prompts_are_like_the_others():
    points = np.array(embed([row["prompt"] for row in ROWS]), float)
    labels = np.array([row["label"] for row in ROWS])
    ratios = np.exp(fit_classifier(points, labels).log_odds(points))
    weights, note = weighed(min_density_ratio=0.2, max_density_ratio=1.5)
    np.testing.assert_allclose(weights, np.where(labels, 1, np.clip(ratios, 0.2, 1.5)), rtol=1e-6)
    assert len(set(weights[~labels])) > 3
    assert note.startswith(f"weights of 16 undesirable examples: from {weights[~labels].min():.3g} to ")
    assert "told by a classifier of 24 prompts that recognises " in note


def test_a_prompt_is_shown_once_and_as_many_as_are_taken_at_once():
    calls = []
    weights, _ = weighed(function=lambda texts: calls.append(texts) or embed(texts), at_once=100)
    assert len(calls) == 1 and sorted(calls[0]) == sorted({row["prompt"] for row in ROWS})
    calls.clear()
    parts, _ = weighed(function=lambda texts: calls.append(texts) or embed(texts), at_once=3)
    assert max(map(len, calls)) <= 3
    np.testing.assert_allclose(parts, weights, rtol=1e-6)


def test_few_prompts_are_sampled_by_the_seed():
    one, note = weighed(prompt_sample_size=3)
    again, _ = weighed(prompt_sample_size=3)
    other, _ = weighed(prompt_sample_size=3, seed=1)
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other) and "of 6 prompts" in note


def test_held_out_examples_of_one_label_are_weighed_too():
    train, held_out, embedder = loader_of(ROWS), loader_of([ROWS[1], ROWS[2]]), Embedder(embed, 8)
    weights = PromptWeights(BCOConfig(), make_tokenizer(), embedder, train.packs.examples)
    for loader in (train, held_out):
        weights.tell(loader, embedder)
    np.testing.assert_array_equal(held_out.packs.facts["weight"], train.packs.facts["weight"][1:3])
    assert held_out.batch(0)["weight"].shape == held_out.batch(0)["label"].shape


def test_other_embeddings_are_told_from_these_but_not_by_rounding():
    def told(function, digest=None):
        loader, embedder = loader_of(ROWS), Embedder(function, 8, digest)
        PromptWeights(BCOConfig(), make_tokenizer(), embedder, loader.packs.examples).tell(loader, embedder)
        return identity(loader, embedder)

    assert told(embed) == told(lambda texts: np.array(embed(texts)) * (1 + 1e-6))
    assert told(embed) != told(lambda texts: [[len(text) % 3] for text in texts])
    assert told(embed, "digest:abc") == {"prompt embeddings": "digest:abc"}


def changing(texts):
    return np.ones((len(texts), len(texts)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda texts: np.ones((len(texts), 2, 3)),
            r"the embeddings of 4 prompts are \[4, 2, 3\]; they must be \[4, E",
        ),
        (lambda texts: np.ones(len(texts)), r"are \[4\]; they must be \[4, E\]"),
        (lambda texts: np.ones((3, 2)), r"the embeddings of 4 prompts are \[3, 2\]"),
        (changing, r"they must be \[5, 4\]"),
        (lambda texts: np.full((len(texts), 2), np.nan), "the embedding of the prompt 'q.*' is not finite"),
        (lambda texts: [[1, np.inf if text == "qab" else 1] for text in texts], "'qab' is not finite"),
        (lambda texts: [[1.0]] * (len(texts) - 1) + [[1.0, 2.0]], "the embeddings of prompts are no array: "),
        (lambda texts: {"embeddings": texts}, "the embeddings of prompts are no array: "),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(function, message):
    with pytest.raises(ConfigError, match=message):
        weighed(function=function)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_sample_size": 0}, "prompt_sample_size is 0; it must be at least 1"),
        ({"min_density_ratio": -0.1}, "min_density_ratio is -0.1; it must be a number from 0 on"),
        ({"min_density_ratio": float("nan")}, "min_density_ratio is nan"),
        ({"min_density_ratio": 2.0, "max_density_ratio": 1.0}, "max_density_ratio is 1.0; .* min_density_ratio 2.0"),
        ({"min_density_ratio": 0.0, "max_density_ratio": 0.0}, "max_density_ratio is 0.0; it must be above 0"),
        ({"max_density_ratio": float("inf")}, "max_density_ratio is inf"),
    ],
)
def test_mistakes_name_the_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        BCOConfig(**changes)


def test_arguments_that_cannot_be_together_are_refused(tiny_folder):
    folder, rows = str(tiny_folder), ROWS * 2
    args = BCOConfig(per_device_train_batch_size=1, embedding_model=folder)
    with pytest.raises(ConfigError, match="embedding_func and embedding_model both embed prompts; give one of them"):
        BCOTrainer(folder, args=args, train_dataset=rows, embedding_func=embed)
    with pytest.raises(ConfigError, match="embedding_tokenizer is not there: embedding_func is given texts; or name"):
        BCOTrainer(folder, train_dataset=rows, embedding_func=embed, embedding_tokenizer=make_tokenizer())
    with pytest.raises(DataError, match="all 16 completions are desirable; this method needs some of either"):
        BCOTrainer(folder, train_dataset=[row for row in rows if row["label"]], embedding_func=embed)
    with pytest.raises(ConfigError, match="nowhere"):
        BCOTrainer(folder, args=BCOConfig(embedding_model="./nowhere"), train_dataset=rows)
