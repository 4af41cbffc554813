"""Every model family against transformers, in float32, on tiny random models.

What transformers says of a document is what it says of that document alone: ours must say the same of it wherever it
stands in a row. That also gives dynamic and LongRoPE frequencies their meaning, which transformers otherwise takes
from the longest row of a batch.
"""

import copy
import logging
import warnings
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.models.checkpoint import read_json
from jaxpost.models.families import FAMILIES, read_config, rows_of
from jaxpost.objectives.sft import SFT
from tests.parity.family_configs import CONFIGS, OLD_SPELLINGS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

LENGTH, PROMPT = 25, 16
DOCUMENTS = [[25], [16], [17, 5]]  # tokens of each document of each row; the length-dependent rotaries change at 16
LONG = ["mistral-window", "gemma2-pattern", "gemma3_text-two_bases", "llama-dynamic"]
MIXTURES = ["mixtral-tied", "qwen2_moe-normalized", "qwen3_moe-normalized"]
BOOKKEEPING = {"transformers_version": None, "_name_or_path": None}
# Compiling is most of this file's time. Programs this small need no optimization: without it, it takes a seventh.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick_jit = partial(jax.jit, compiler_options=QUICK)


class Pair(NamedTuple):
    """A random transformers model, the language model in it, and ours, read from its folder.

    `language` is all of `theirs`, unless that sees images too: ours does not, and is exported without.
    """

    theirs: Any
    language: Any
    ours: Any


def make_theirs(name):
    """A transformers model whose every parameter is random, so that none can be left out unseen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**copy.deepcopy(CONFIGS[name]))
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    torch.manual_seed(0)
    for parameter_name, parameter in theirs.named_parameters():
        around_one = parameter_name.endswith("norm.weight") and "gemma" not in name
        torch.nn.init.normal_(parameter, 1.0 if around_one else 0.0, 0.2)
    return theirs.eval()


def language_model(theirs):
    """The same parameters, without what only images go through."""
    from transformers import AutoModelForCausalLM

    if theirs.config.model_type != "gemma3":
        return theirs
    config = copy.deepcopy(theirs.config.text_config)
    config.tie_word_embeddings = theirs.config.tie_word_embeddings
    language = AutoModelForCausalLM.from_config(config)
    language.model, language.lm_head = theirs.model.language_model, theirs.lm_head
    return language


@pytest.fixture(scope="session")
def pair(request, tmp_path_factory):
    """Pytest orders the tests by it, so that each pair is built once."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = make_theirs(request.param)
    theirs.save_pretrained(folder)
    return Pair(theirs, language_model(theirs), from_pretrained(folder))


every_config = pytest.mark.parametrize("pair", CONFIGS, indirect=True)


def make_rows(documents, length):
    """Rows of packed documents, right-padded; the first token of a document is never trained."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 301, (len(documents), length)).astype(np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, sizes in enumerate(documents):
        for segment, (size, stop) in enumerate(zip(sizes, np.cumsum(sizes), strict=True), start=1):
            positions[row, stop - size : stop], segments[row, stop - size : stop] = np.arange(size), segment
    trained = (positions > 0) & (rng.random(tokens.shape) < 0.7)
    return {
        "tokens": np.where(segments > 0, tokens, 0),
        "positions": positions,
        "segments": segments,
        "loss_mask": trained.astype(np.float32),
    }


def documents_of(rows):
    """Where each document stands: its row and its slice."""
    for row, segments in enumerate(rows["segments"]):
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            yield row, slice(places[0], places[-1] + 1)


def logits_alone(theirs, tokens):
    """Logits [T, V] of one document, as a fresh transformers model computes them."""
    theirs(torch.zeros((1, 1), dtype=torch.long))  # dynamic frequencies remember the longest text until a short one
    return theirs(torch.tensor(tokens[None]).long()).logits[0]


@quick_jit
def our_logits(model, rows):
    return model(rows["tokens"], rows["positions"], rows["segments"])


@partial(quick_jit, static_argnums=(0, 1))
def our_gradient(objective, graphdef, weights, rows):
    """Loss and its gradient by every parameter."""

    def mean_loss(weights):
        loss, _ = objective.loss(nnx.merge(graphdef, weights), rows)
        return loss.value()

    return jax.value_and_grad(mean_loss)(weights)


def relative(a, b):
    """Largest difference over the largest value, which for gradients that are 0 but for rounding counts as 1e-4."""
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-4)


def compare_logits(pair, rows):
    logits = np.asarray(our_logits(pair.ours, rows))
    for row, place in documents_of(rows):
        with torch.no_grad():
            expected = logits_alone(pair.theirs, rows["tokens"][row, place]).numpy()
        assert relative(logits[row, place], expected) < 1e-4, (row, place)


@every_config
def test_logits_of_packed_and_padded_rows(pair):
    compare_logits(pair, make_rows(DOCUMENTS, LENGTH))


@pytest.mark.parametrize("pair", LONG, indirect=True)
def test_logits_of_rows_longer_than_an_attention_tile(pair):
    compare_logits(pair, make_rows([[300], [130, 140]], 300))


@every_config
def test_cached_decoding_equals_the_forward_pass(pair):
    rows = make_rows([[LENGTH]] * 3, LENGTH)
    lengths = np.array([PROMPT, 3, 9], np.int32)
    cached = np.asarray(cached_logits(pair.ours, rows["tokens"], lengths))
    places = lengths[:, None] - 1 + np.arange(cached.shape[1])
    expected = np.take_along_axis(np.asarray(our_logits(pair.ours, rows)), places[..., None], axis=1)
    assert relative(cached, expected) < 1e-5


@quick_jit
def cached_logits(model, tokens, lengths):
    """Logits after each row's prompt and after each of the tokens that follow it: [B, 1 + LENGTH - PROMPT, V]."""
    first, cache = model.prefill(tokens[:, :PROMPT], lengths, cache_length=LENGTH)

    def step(cache, _):
        token = jnp.take_along_axis(tokens, cache.lengths[:, None], axis=1)[:, 0]
        h, cache = model.decode(token, cache)
        return cache, h

    _, others = jax.lax.scan(step, cache, length=LENGTH - PROMPT)
    return model.unembed(jnp.concatenate([first[:, None], others.swapaxes(0, 1)], axis=1))


@every_config
def test_gradients(pair, tmp_path):
    rows = make_rows(DOCUMENTS, LENGTH)
    nlls = []
    for row, place in documents_of(rows):
        logps = logits_alone(pair.theirs, rows["tokens"][row, place]).log_softmax(-1)
        chosen = logps[:-1].gather(1, torch.tensor(rows["tokens"][row, place][1:, None]).long())[:, 0]
        nlls.append(-chosen[torch.tensor(rows["loss_mask"][row, place][1:] > 0)])
    compare_gradients(pair, SFT(), rows, torch.cat(nlls).mean(), tmp_path)


@pytest.mark.parametrize("pair", MIXTURES, indirect=True)
def test_balance_of_the_experts_and_its_gradients(pair, tmp_path):
    rows = make_rows([[25], [16], [9]], LENGTH)
    labels = torch.tensor(np.where(rows["loss_mask"] > 0, rows["tokens"], -100)).long()
    inputs = {"input_ids": torch.tensor(rows["tokens"]).long(), "attention_mask": torch.tensor(rows["segments"]).long()}
    pair.theirs.router_aux_loss_coef = 0.5
    said = pair.theirs(**inputs, labels=labels, output_router_logits=True)
    compare_gradients(pair, SFT(router_aux_loss_coef=0.5), rows, said.loss, tmp_path)


def compare_gradients(pair, objective, rows, their_loss, folder):
    """Theirs under the names of the files, which transformers knows to give: as a saved model."""
    pair.theirs.zero_grad()
    their_loss.backward()
    holder = copy.deepcopy(pair.language)
    with torch.no_grad():
        for place, parameter in zip(holder.parameters(), pair.language.parameters(), strict=True):
            place.copy_(parameter.grad)
    holder.save_pretrained(folder)
    expected = load_file(folder / "model.safetensors")
    loss, gradient = our_gradient(objective, *nnx.split(pair.ours), rows)
    assert relative(np.asarray(loss), their_loss.detach().numpy()) < 1e-5
    for path, parameter in nnx.to_flat_state(gradient):
        ours = np.asarray(parameter[...])
        (row,) = (row for row in rows_of(pair.ours.config) if row.path == ".".join(map(str, path)))
        for index in np.ndindex(ours.shape[: row.hf_name.count("{}")]):
            name = row.hf_name.format(*index)
            theirs = expected[name] if row.part is None else expected[name][row.part.start : row.part.stop]
            assert relative(ours[index].T if row.transpose else ours[index], theirs) < 1e-3, (row.path, name)


@contextmanager
def complaints():
    """Collects the warnings of Python and of transformers."""
    from transformers.utils.logging import warning_once

    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("transformers")
    warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield heard
    finally:
        logger.removeHandler(handler)
    heard += [str(warning.message) for warning in warned]


@every_config
def test_round_trip_is_exact_and_loads_without_a_warning(pair, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = tmp_path / "theirs", tmp_path / "ours"
    pair.language.save_pretrained(folders[0])
    save_pretrained(pair.ours, None, folders[1])
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and np.array_equal(before[name], after[name]), name
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in folders)
    assert {**before, **BOOKKEEPING} == {**after, **BOOKKEEPING}
    with complaints() as of_theirs:
        AutoModelForCausalLM.from_pretrained(folders[0])
    with complaints() as of_ours:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folders[1], output_loading_info=True)
    again, info = loaded
    assert not any(info.values()), info
    assert of_ours == of_theirs  # LongRoPE without a factor, as Phi-3 was released, is warned of
    for (name, a), (_, b) in zip(pair.language.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_every_family_is_compared():
    assert set(FAMILIES) <= {name.split("-")[0] for name in CONFIGS}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_released_configs_read_as_transformers_reads_them(name, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(**copy.deepcopy(OLD_SPELLINGS[name])).save_pretrained(tmp_path)
    assert read_config(OLD_SPELLINGS[name], "old") == read_config(read_json(tmp_path / "config.json"), "new")


@pytest.mark.parametrize("fields", [*CONFIGS.values(), *OLD_SPELLINGS.values()], ids=[*CONFIGS, *OLD_SPELLINGS])
def test_windows_are_those_of_transformers(fields):
    from transformers import AutoConfig

    fields = fields.get("text_config", fields)
    theirs = AutoConfig.for_model(**copy.deepcopy(fields))
    kinds = theirs.to_dict().get("layer_types") or ["sliding_attention"] * theirs.num_hidden_layers
    window = theirs.to_dict().get("sliding_window") or None
    expected = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert read_config(fields, "it").layer_windows == expected
