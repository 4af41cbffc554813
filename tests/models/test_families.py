"""Every family: its fields, its parameters on a mesh, its budget of switches, and how compiling grows with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models.config import Compute, ModelConfig
from jaxpost.models.families import FAMILIES, architecture, read_config, rows_of
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.sft import SFT
from jaxpost.sharding import make_mesh, path_of
from tests.conftest import make_batch, make_model

BASE = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 5,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FIELDS = {
    "llama": {"sliding_window": None},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS,
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "olmo2": {"sliding_window": None},
    "gemma": {"sliding_window": None},
    "granite": {"sliding_window": None},
}


def fields_of(kind):
    return {"model_type": kind, **BASE, **FIELDS.get(kind, {})}


def make_family(kind):
    return Decoder(read_config(fields_of(kind), kind), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_has_its_row_and_its_place_on_a_mesh(kind, tmp_path):
    model = make_family(kind)
    paths = sorted(path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))))
    assert paths == sorted(row.path for row in rows_of(model.config))
    save_pretrained(model, None, tmp_path / "a")
    mesh = make_mesh("fsdp=4,tensor=2")
    spread = from_pretrained(tmp_path / "a", mesh=mesh)
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(spread)), strict=True):
        np.testing.assert_array_equal(a, b)
    batch = make_batch(rows=4, length=16, vocab_size=300)
    one = SFT().loss(model, jax.tree.map(jnp.asarray, batch))[0].value()
    with jax.set_mesh(mesh):
        many = jax.jit(lambda model, batch: SFT().loss(model, batch)[0].value())(spread, batch)
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_the_block_keeps_its_budget_of_switches():
    sizes = {name for name in vars(ModelConfig)["__dataclass_fields__"] if name.startswith(("num_", "max_"))}
    sizes |= {"vocab_size", "embed_dim", "mlp_dim", "head_dim", "norm_eps", "hf"}
    switches = {field.name for field in dataclasses.fields(ModelConfig)} - sizes
    assert len(switches) <= 16, sorted(switches)


@pytest.mark.parametrize("head", ["lm", "reward"])
def test_architectures_are_transformers_classes(head):
    import transformers

    named = {kind: make_config(kind, head) for kind in FAMILIES}
    missing = {kind for kind, name in named.items() if name is None}
    assert missing == ({"granite"} if head == "reward" else set())
    assert all(hasattr(transformers, name) for name in named.values() if name)


def make_config(kind, head):
    try:
        return architecture(read_config(fields_of(kind), kind), head)
    except ConfigError:
        return None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "must name 3 layers"),
        ("gemma2", {"layer_types": ["full_attention"] * 2 + ["chunked"]}, "each full_attention or sliding_attention"),
        ("gemma2", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "no sliding_window"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True, which is not"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "settings of full_attention and"),
        ("gemma3_text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "visits 5 experts, but there are 4"),
        ("qwen3_moe", {"num_local_experts": 3}, "num_local_experts and num_experts"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("smollm3", {"no_rope_layers": [1, 2, 0]}, "no_rope_layers must hold 0 or 1"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "8 positive"),
        ("phi3", {"partial_rotary_factor": 0.2}, "3 of 16 head dimensions"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": -1.0}}, "factor = -1.0"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta": 1.0}}, "beta = 1.0"),
        ("llama", {"rope_parameters": [1]}, "expected dict"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes', expected bool"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        (["llama"], {}, "model_type"),
    ],
)
def test_a_field_that_cannot_be_is_named(kind, changes, message):
    fields = {**(fields_of(kind) if isinstance(kind, str) else BASE), "model_type": kind, **changes}
    with pytest.raises(ConfigError, match=message):
        read_config(fields, "tiny")


def test_programs_do_not_grow_with_depth():
    def program(layers):
        model = make_model(num_hidden_layers=layers)
        model.compute = Compute(remat="dots")
        batch = jax.tree.map(jnp.asarray, make_batch(rows=2, length=16))
        gradient = jax.jit(jax.grad(lambda model, batch: SFT().loss(model, batch)[0].total))
        return gradient.lower(model, batch).as_text().count("\n")

    assert program(64) == program(8)
