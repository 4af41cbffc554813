"""Adapters of a model: exchanged, kept as a reference, merged, and refused where they cannot be made."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost.errors import ConfigError
from jaxpost.models.adapters import (
    active_parts,
    attach,
    folded,
    keep_reference,
    merge_adapter,
    reference_view,
    set_adapter,
    without_adapters,
)
from jaxpost.models.export import save_pretrained
from jaxpost.models.lora import trainable_filter
from jaxpost.models.lora_config import LoRAArguments, LoraConfig, as_lora_config
from jaxpost.models.quant import dequantize, quantize
from tests.conftest import make_model
from tests.models.test_lora import ALL, EVERYWHERE, gradient, logits, make_moe, train_a_little


def copies(model):
    """Where each array of a model is in memory."""
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}


def test_switching_copies_nothing_and_trains_what_is_in_use():
    model = make_model()
    base = copies(model)
    first = train_a_little(attach(model, ALL, name="first"))
    expected = {"first": logits(first), None: logits(without_adapters(model))}
    expected["second"] = logits(train_a_little(attach(model, EVERYWHERE, name="second"), seed=1))
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model))}
    for name in ("first", "second", None, "first"):
        assert np.array_equal(logits(set_adapter(model, name)), expected[name])
        assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model))} == held
        assert copies(model) == base == copies(without_adapters(model))
    assert (
        set(gradient(model)) == {f"{path}.{name}" for path in active_parts(model) for name in ("lora_a", "lora_b")}
        and len(active_parts(model)) == 7
    )


def test_the_reference_of_a_new_adapter_is_the_base_and_of_an_old_one_its_start():
    model = train_a_little(attach(make_model(), ALL))
    assert np.array_equal(logits(reference_view(model)), logits(make_model()))
    start = logits(keep_reference(model))
    graphdef, trained, others = nnx.split(model, trainable_filter(model), ...)
    step = jax.jit(lambda trained: jax.tree.map(lambda leaf: leaf + 0.1, trained), donate_argnums=0)
    model = nnx.merge(graphdef, step(trained), others)  # what training does to the arrays
    assert not np.array_equal(logits(model), start)
    assert np.array_equal(logits(reference_view(model)), start)
    assert not any("reference" in path for path in gradient(model))


@pytest.mark.parametrize("config", [ALL, dataclasses.replace(ALL, use_dora=True), EVERYWHERE], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_merged(config, tied):
    model = train_a_little(attach(make_model(tie_word_embeddings=tied), config))
    merged = merge_adapter(model)
    np.testing.assert_allclose(logits(merged), logits(model), atol=2e-5)
    assert merged.adapters is None and not active_parts(merged) and active_parts(model)
    assert (
        merged.config.tie_embeddings == (tied and config is not EVERYWHERE) == merged.config.hf["tie_word_embeddings"]
    )
    shared = copies(merged) & copies(model)
    assert merged.norm.scale[...].unsafe_buffer_pointer() in shared
    assert merged.layers.mlp.down.kernel[...].unsafe_buffer_pointer() not in shared
    again = folded(model)
    np.testing.assert_allclose(logits(again), logits(merged), atol=2e-5)
    assert shared <= copies(again) and nnx.split(again)[0] == nnx.split(merged)[0]


def test_merged_into_few_bits_of_precision_and_into_few_bits():
    model = make_model()
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model)))
    train_a_little(attach(model, ALL))
    assert active_parts(model)["layers.mlp.up.adapter"].lora_a[...].dtype == jnp.float32
    assert folded(model) is model  # which would lose what an update adds to bfloat16
    merged = merge_adapter(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(merged))} == {jnp.dtype(jnp.bfloat16)}
    quantized = train_a_little(attach(quantize(make_model(), "nf4"), LoraConfig(r=4)))
    assert folded(quantized) is quantized
    merged = dequantize(merge_adapter(quantized), "float32")
    np.testing.assert_allclose(logits(merged), logits(quantized), atol=2e-5)


REFUSED = {
    "unknown target": (
        dict(target_modules=["q_proj", "qproj"]),
        "nothing in the model matches 'qproj'; it has down_proj",
    ),
    "unknown expression": (dict(target_modules=r".*\.w1"), r"nothing in the model matches '.*\\\\.w1'"),
    "no expression": (dict(target_modules="(q_proj"), r"'\(q_proj' is no regular expression"),
    "rank": (dict(r=17, target_modules=["k_proj", "down_proj"]), None),
    "rank too large": (
        dict(r=33, target_modules=["k_proj"]),
        r"r is 33, beyond the smaller dimension of k_proj \(32 x 32\)",
    ),
    "layer": (dict(layers_to_transform=[0, 2]), "layers_to_transform names layer 2; the model has 2"),
    "saved": (
        dict(modules_to_save=["norm"]),
        "'norm' cannot be trained as a whole; this model has embed_tokens, lm_head",
    ),
    "excluded": (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "all that is targeted is excluded"),
    "no parameter": (dict(target_parameters=["experts.down_proj"]), "target_parameters: nothing in the model matches"),
    "init": (
        dict(init_lora_weights="eva"),
        "init_lora_weights is 'eva'; it takes one of: default, gaussian, pissa, olora",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_attached_is_refused_by_name(what):
    fields, reason = REFUSED[what]
    if reason is None:
        attach(make_model(), LoraConfig(**fields))
        return
    with pytest.raises(ConfigError, match=reason):
        attach(make_model(), LoraConfig(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        *({"r": 0}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}),
        *({"bias": "all"}, {"layers_pattern": "h"}, {"layers_to_transform": [-1]}, {"target_modules": [1]}),
        *({"rank_pattern": {"q": 0}}, {"rank_pattern": {"(": 1}}, {"alpha_pattern": {"(a+)+": 1}}),
        {"alpha_pattern": {"a*b*c*d*": 1}},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LoraConfig(**fields)


class Live:
    """Like a config of PEFT's."""

    def __init__(self, **fields):
        self.fields = fields

    def to_dict(self):
        return {
            "peft_type": "LORA",
            "bias": "none",
            "loftq_config": {},
            "megatron_core": "megatron.core",
            **self.fields,
        }


def test_configs_of_pefts_are_taken_and_what_they_ask_for_in_vain_is_named():
    config = as_lora_config(Live(r=4, target_modules={"v_proj", "q_proj"}, task_type="CAUSAL_LM", peft_version="1"))
    assert config == LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert as_lora_config(config) is config and hash(config) == hash(dataclasses.replace(config))
    for field, value in {"lora_bias": True, "use_qalora": True, "layer_replication": [[0, 1]], "new_field": 3}.items():
        with pytest.raises(ConfigError, match=f"peft_config: jaxpost does not support {field} = "):
            as_lora_config(Live(**{field: value}))
    with pytest.raises(ConfigError, match="peft_type 'IA3' is not supported; only LORA is"):
        as_lora_config(Live(peft_type="PeftType.IA3"))


def test_flags_become_a_config():
    assert LoRAArguments(use_peft=True, lora_target_modules=["all-linear"]).lora_config().target_modules == "all-linear"
    assert LoRAArguments(lora_target_modules=[r".*q_proj"]).lora_config().target_modules == ".*q_proj"
    config = LoRAArguments(
        lora_target_modules=["q_proj"], lora_init="olora", lora_layers_to_transform=[1]
    ).lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.init) == (16, 32, 0.05, "olora")
    assert config.target_modules == ("q_proj",) and config.layers_to_transform == (1,)
    assert LoRAArguments(lora_r=0).use_peft is False
    with pytest.raises(ConfigError, match="r is 0"):
        LoRAArguments(use_peft=True, lora_r=0)


def test_experts_and_quantised_kernels_take_what_they_can(caplog):
    with pytest.raises(ConfigError, match="take neither lora_dropout nor use_dora"):
        attach(make_moe(), dataclasses.replace(ALL, lora_dropout=0.1))
    with pytest.raises(ConfigError, match="needs kernels that are not quantised"):
        attach(quantize(make_model(), "nf4"), dataclasses.replace(ALL, init_lora_weights="pissa"))
    with caplog.at_level(logging.INFO, "jaxpost"):
        model = attach(make_moe(), dataclasses.replace(ALL, r=8))
    assert "all-linear leaves out layers.mlp.router (32 x 4)" in caplog.text
    assert "layers.mlp.experts.up.adapter" in active_parts(model)
    assert "layers.mlp.router.adapter" not in active_parts(model)


def test_names_of_adapters():
    model = attach(make_model(), ALL, name="one")
    with pytest.raises(ConfigError, match="no adapter 'two'; it has one"):
        set_adapter(model, "two")
    with pytest.raises(ConfigError, match="without dots"):
        attach(model, ALL, name="a.b")
    with pytest.raises(ConfigError, match="no adapter to keep"):
        keep_reference(make_model())


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path):
    model = attach(make_model(), LoraConfig())
    with pytest.raises(ConfigError, match="save_adapter writes the one in use; merge_adapter"):
        save_pretrained(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_pretrained(merge_adapter(model), None, tmp_path / "out")
