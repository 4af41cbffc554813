"""Nothing of an adapter's folder is believed before it is checked: what does not fit is refused in one line."""

import json
import math
import pickle
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models.adapters import attach
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.peft import load_adapter, save_adapter
from jaxpost.models.peft_folder import open_adapter
from tests.conftest import make_model
from tests.models.test_lora import logits, train_a_little
from tests.models.test_peft import CONFIG, LORA, WEIGHTS, edit, edit_tensors, refusal

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def base(tiny_folder):
    return str(tiny_folder)


@pytest.fixture
def folder(base, tmp_path):
    """A new adapter of the tiny model."""
    save_adapter(attach(from_pretrained(base), LORA), tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it is for; set base_model_name_or_path in"),
        (
            {"base_model_name_or_path": "/nowhere/model"},
            "the model that it is for, '/nowhere/model', does not exist here",
        ),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5, which is of the wrong type"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only LORA is"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}, "peft_type 'PROMPT_TUNING' is not supported"),
        ({"lora_bias": True}, "jaxpost does not support lora_bias = True"),
        ({"bias": "all"}, "bias is 'all'; it takes none: biases are not trained"),
        ({"layer_replication": [[0, 1]]}, "does not support layer_replication"),
        ({"trainable_token_indices": [1]}, "does not support trainable_token_indices"),
        ({"ensure_weight_tying": True}, "does not support ensure_weight_tying"),
        ({"use_qdora": True}, r"does not support use_qdora = True (did you mean 'use_dora'?)"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda' changes the base in a way that cannot be repeated"),
        ({"r": 3}, "wrong shape or rank: model.layers.0.mlp.down_proj.lora_A.weight [4, 64] instead of [3, 64], "),
        ({"r": "4"}, "r is '4', which is of the wrong type"),
        ({"r": True}, "r is True; it takes a positive whole number"),
        ({"lora_alpha": [1]}, "lora_alpha is [1], which is of the wrong type"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf; it takes a positive number"),
        ({"use_dora": True}, "missing: magnitude of model.layers.0.mlp.down_proj"),
        ({"modules_to_save": ["lm_head"]}, "missing: lm_head.weight"),
        ({"alpha_pattern": {"(a|a)*b": 2}}, "alpha_pattern is {'(a|a)*b': 2}; it takes up to 1024 regular expressions"),
        ({"rank_pattern": {"x": 1, "y": "z"}}, "rank_pattern"),
        ({"rank_pattern": dict.fromkeys(map(str, range(2000)), 1)}, "it takes up to 1024 regular expressions"),
        ({"target_modules": {"a": 1}}, "target_modules is {'a': 1}; it takes a text or a list of texts"),
        ({"task_type": "SEQ_CLS"}, 'load it with head="reward"'),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused_by_name(folder, fields, reason):
    edit(folder, **fields)
    assert reason in refusal(folder)


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed("q_proj", "qkv_proj"), "unexpected: model.layers.0.self_attn.qkv_proj.lora_A.weight"),
        (renamed("layers.1.", "layers.2."), "unexpected: model.layers.2.mlp.down_proj.lora_A.weight"),
        (renamed("layers.1.", "layers.01."), "unexpected: model.layers.01.mlp.down_proj.lora_A.weight"),
        (renamed("layers.1.", f"layers.{10**30}."), "unexpected: model.layers.1000000"),
        (renamed("lora_A", "lora_C"), "missing: a of model.layers.0.mlp.down_proj"),
        (lambda tensors: {Q: tensors[Q]}, "missing: b of model.layers.0.self_attn.q_proj"),
        (lambda tensors: {**tensors, Q: tensors[Q][:, :5].copy()}, "[4, 5] instead of [4, 32]"),
        (lambda tensors: {**tensors, Q: tensors[Q][0]}, "[32] instead of [4, 32]"),
        (lambda tensors: {**tensors, Q: tensors[Q] * np.float32(np.nan)}, "q_proj.lora_A.weight holds NaN or infinity"),
        (
            lambda tensors: {**tensors, "base_model.model.model.norm.weight": np.ones(32)},
            "unexpected: model.norm.weight",
        ),
        (lambda tensors: {**tensors, Q.replace("lora_A", "base_layer"): np.ones((64, 32))}, "unexpected"),
        (
            lambda tensors: {**tensors, "base_model.model.lm_head.base_layer.weight": np.ones((320, 32), np.float32)},
            "missing: a of lm_head, b of lm_head",
        ),
        (lambda tensors: {"nothing": np.ones(1)}, "unexpected: nothing"),
    ],
)
def test_the_tensors_of_another_model_are_listed(folder, change, reason):
    edit_tensors(folder, change)
    message = refusal(folder)
    assert reason in message and str(folder) in message


def test_many_misfits_make_a_short_message(folder, tmp_path):
    other = make_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    save_pretrained(other, None, tmp_path / "other")
    edit(folder, base_model_name_or_path=str(tmp_path / "other"))
    message = refusal(folder)
    assert "does not fit this llama model; wrong shape or rank: " in message and " and 1 more" in message


def test_a_base_that_is_stored_with_the_adapter_must_be_this_one(base, tmp_path):
    model = train_a_little(attach(from_pretrained(base), LoraConfig(r=4, target_modules=["embed_tokens"])))
    save_adapter(model, tmp_path / "a", base)
    embedding = np.asarray(model.embed.embedding[...])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(tmp_path / "a", lambda tensors: {**tensors, name: embedding.astype(ml_dtypes.bfloat16)})
    assert np.array_equal(logits(from_pretrained(tmp_path / "a")), logits(model))
    edit_tensors(tmp_path / "a", lambda tensors: {**tensors, name: embedding * np.float32(1.1)})
    assert "embed_tokens.base_layer.weight, whose values are not this model's" in refusal(tmp_path / "a")


class Bomb:
    def __reduce__(self):
        return (exit, (99,))


def test_files_that_are_missing_damaged_or_never_opened(folder, tmp_path):
    sound = shutil.copytree(folder, tmp_path / "sound")
    (folder / WEIGHTS).unlink()
    assert f"no {WEIGHTS} beside {CONFIG}" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "adapter_model.bin: pickled weights can run code and are never opened" in refusal(folder)
    (folder / WEIGHTS).write_bytes((sound / WEIGHTS).read_bytes()[:-1])
    assert "not a valid safetensors file" in refusal(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(sound / WEIGHTS)
    assert "outside of the model's folder" in refusal(folder)
    (folder / WEIGHTS).unlink()
    shutil.copy(sound / WEIGHTS, folder / WEIGHTS)
    (folder / CONFIG).write_text('{"r": 1, "r": 2}')
    assert "it holds the key r twice" in refusal(folder)
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(sound / CONFIG)
    assert "outside of the model's folder" in refusal(folder)
    (folder / CONFIG).unlink()
    assert "no config.json" in refusal(folder)


def test_a_huge_rank_takes_no_memory(folder):
    edit(folder, r=10**12, lora_alpha=1)
    adapter = open_adapter(folder)
    model = from_pretrained(adapter.base)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="instead of"):
            load_adapter(model, folder)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


VALUES = [
    0,
    -1,
    10**30,
    1.5,
    math.nan,
    True,
    None,
    "",
    "x",
    [],
    {},
    [[1]],
    {"a": {}},
    "q_proj" * 50,
    ["\n"],
    [None],
    10**400,
]


def test_any_value_of_any_field_loads_or_is_refused_in_one_line(folder):
    names = [*json.loads((folder / CONFIG).read_text()), "lora_bias", "layers_pattern", "target_parameters", "new"]
    text, outcomes = (folder / CONFIG).read_text(), set()
    for name in names:
        for value in VALUES:
            if name == "base_model_name_or_path" and isinstance(value, str) and value:
                continue  # the hub is not asked here
            edit(folder, **{name: value})
            try:
                from_pretrained(folder)
                outcomes.add("loaded")
            except ConfigError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
            (folder / CONFIG).write_text(text)
    assert outcomes == {"loaded", "refused"}
