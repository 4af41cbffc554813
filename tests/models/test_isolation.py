"""Packed documents through the whole model, around the edges of an attention tile: each is as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost import SFTConfig, SFTTrainer
from jaxpost.models.families import read_config
from jaxpost.models.tiles import BLOCK
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.logps import score_batch
from tests.conftest import TINY_LLAMA, make_model

VOCAB = 320  # of the tiny model
ROOM = 130  # a little more than a tile
PADDING = 20  # at the end of a row
ROWS = [
    [BLOCK - 1, BLOCK, BLOCK + 1, 300],
    [300, BLOCK + 1, BLOCK, BLOCK - 1],
    [1, 2, BLOCK - 3, BLOCK, 2 * BLOCK, 44 + BLOCK],
]
SHARED = {name: value for name, value in TINY_LLAMA.items() if name != "mlp_bias"}  # which Gemma does not have
MODELS = {
    "full": {"tie_word_embeddings": False},
    "window and softcap": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 100,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    },
}


@pytest.fixture(params=MODELS)
def model(request):
    return make_decoder(request.param)


def make_decoder(name):
    return Decoder(read_config({**SHARED, **MODELS[name]}, name), rngs=nnx.Rngs(0))


def pack(sizes, seed=0, low=3, high=VOCAB):
    """One row [1, T] of random documents of these sizes and some padding, all their tokens but the first trained."""
    tokens = np.random.default_rng(seed).integers(low, high, sum(sizes) + PADDING)
    segments = np.repeat([*range(1, len(sizes) + 1), 0], [*sizes, PADDING])
    positions = np.concatenate([*map(np.arange, sizes), np.zeros(PADDING)])
    columns = {"tokens": tokens, "positions": positions, "segments": segments}
    return {
        **{name: jnp.asarray(column[None], jnp.int32) for name, column in columns.items()},
        "loss_mask": jnp.asarray(positions[None] > 0, jnp.float32),
    }


def part_loss(weights, graphdef, batch, part):
    """The loss of document `part` of a row in which all documents are scored."""
    scores, mask, _ = score_batch(nnx.merge(graphdef, weights), batch)
    return -jnp.sum(jnp.where(mask & (batch["segments"] == part), scores.logps, 0.0))


gradient = jax.jit(jax.grad(part_loss), static_argnums=1)


def documents(batch):
    """Each document's row, and its tokens' places there."""
    for row, segments in enumerate(np.asarray(batch["segments"])):
        for number in range(1, segments.max() + 1):
            yield row, np.flatnonzero(segments == number)


def assert_documents_are_as_if_alone(model, batch):
    """The logits of every document of a batch are those of the document in a row of its own."""
    tokens, logits = np.asarray(batch["tokens"]), run(model, batch)
    for row, ours in documents(batch):
        places = np.arange(tokens.shape[1])[None]
        real = places < len(ours)
        alone = {"tokens": np.where(real, np.roll(tokens[row], -ours[0]), 0), "positions": places, "segments": real}
        expected = run(model, {name: jnp.asarray(column, jnp.int32) for name, column in alone.items()})
        np.testing.assert_allclose(logits[row, ours], expected[0, : len(ours)], atol=1e-5)


@nnx.jit
def run(model, batch):
    return model(batch["tokens"], batch["positions"], batch["segments"])


@pytest.mark.parametrize("sizes", ROWS, ids=str)
def test_logits_are_those_of_the_document_alone(model, sizes):
    assert_documents_are_as_if_alone(model, pack(sizes))


@pytest.mark.parametrize(
    ("strategy", "pieces"),
    [
        ("bfd_split", [[130, 130, 40], [127], [129], [128], [45]]),
        ("wrapped", [[130, 130, 40], [90, 37], [93, 36], [94, 34], [45]]),
    ],
)
def test_a_piece_of_a_cut_row_is_a_document_of_its_own(strategy, pieces, tokenizer, tmp_path):
    rng, model = np.random.default_rng(0), make_model()
    rows = [rng.integers(3, 259, sum(sizes)).tolist() for sizes in pieces]
    config = SFTConfig(
        output_dir=str(tmp_path),
        packing=True,
        packing_strategy=strategy,
        max_length=ROOM,
        per_device_train_batch_size=1,  # for each of the eight devices
        compilation_cache_dir="",
        tokenized_cache_dir="",
    )
    trainer = SFTTrainer(model, config, None, [{"input_ids": row} for row in rows], processing_class=tokenizer)
    batch = trainer.feed.loader.batch(0)
    expected = {
        tuple(piece.tolist())
        for row, sizes in zip(rows, pieces, strict=True)
        for piece in np.split(np.array(row), np.cumsum(sizes)[:-1])
    }
    found = {
        tuple(batch["tokens"][row, ours].tolist()): (
            batch["positions"][row, ours].tolist(),
            batch["loss_mask"][row, ours].tolist(),
        )
        for row, ours in documents(batch)
    }
    assert found == {piece: (list(range(len(piece))), [0] + [1] * (len(piece) - 1)) for piece in expected}
    assert_documents_are_as_if_alone(model, batch)


@pytest.mark.parametrize("part", [1, 2, 4])
def test_gradients_are_the_same_bits_whatever_the_other_documents_say(model, part):
    sizes = ROWS[0]
    batch, other = pack(sizes), pack(sizes, seed=1)
    ours = batch["segments"] == part
    changed = {**batch, "tokens": jnp.where(ours, batch["tokens"], other["tokens"])}
    trained = {"loss_mask": batch["loss_mask"] * ours}
    graphdef, weights = nnx.split(model)
    one, two = (gradient(weights, graphdef, {**columns, **trained}, part) for columns in (batch, changed))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.any(a)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("part", [1, 2])
def test_a_loss_has_exactly_no_gradient_in_the_tokens_of_another_document(part):
    graphdef, weights = nnx.split(make_decoder("full"))
    low, high = pack(ROWS[0], high=VOCAB // 2), pack(ROWS[0], low=VOCAB // 2)
    ours = low["segments"] == part
    batch = {**low, "tokens": jnp.where(ours, low["tokens"], high["tokens"])}
    rows = gradient(weights, graphdef, batch, part)["embed"]["embedding"].get_value()
    assert np.any(rows[: VOCAB // 2])
    assert not np.any(rows[VOCAB // 2 :])
