"""Adapter folders, in and out, without PEFT: what is written is what is read."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import peft
from jaxpost.models.adapters import active_config, active_parts, attach, merge_adapter, set_adapter
from jaxpost.models.lora import trainable_filter
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.lora_targets import Target
from jaxpost.models.peft import load_adapter, save_adapter
from jaxpost.models.peft_folder import open_adapter
from jaxpost.models.peft_tensors import Part, from_peft, fused, to_peft
from jaxpost.models.resize import resize_embeddings
from jaxpost.models.rows import Part as Outputs
from jaxpost.sharding import make_mesh
from tests.conftest import make_model
from tests.models.test_lora import logits, make_moe, train_a_little

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)


@pytest.fixture
def base(tiny_folder):
    return str(tiny_folder)


@pytest.fixture
def folder(base, tmp_path):
    """A trained adapter of the tiny model."""
    save_adapter(train_a_little(attach(from_pretrained(base), LORA)), tmp_path / "adapter", base)
    return tmp_path / "adapter"


def edit(folder, remove=(), **fields):
    """Change adapter_config.json."""
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name not in remove}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(dict(tensors)) or tensors, folder / WEIGHTS)


def refusal(folder, **options):
    with pytest.raises(ConfigError) as caught:
        from_pretrained(folder, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and len(str(caught.value)) < 1200
    return str(caught.value)


CONFIGS = {
    "lora": LORA,
    "all": LoraConfig(r=3, target_modules="all-linear", use_rslora=True, lora_alpha=5, layers_to_transform=[1]),
    "dora": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "o_proj"], use_dora=True),
    "saved": LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"]),
    "patterns": LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 3}),
    "expression": LoraConfig(r=2, target_modules=r".*\.1\.(mlp|self_attn)\.[ug].*", exclude_modules=["gate_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read_and_finds_its_base(name, tied, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    save_pretrained(model, None, tmp_path / "base")
    train_a_little(attach(model, CONFIGS[name]))
    save_adapter(model, tmp_path / "a", str(tmp_path / "base"), revision="v1")
    again = from_pretrained(tmp_path / "a")
    assert np.array_equal(logits(again), logits(model))
    config = active_config(again)
    assert config is not None and config.base_model_name_or_path == str(tmp_path / "base") and config.revision == "v1"
    save_adapter(again, tmp_path / "b", str(tmp_path / "base"))
    assert (tmp_path / "a" / CONFIG).read_text() == (tmp_path / "b" / CONFIG).read_text()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_layers_that_are_left_out_are_not_written(tmp_path, base):
    model = attach(from_pretrained(base), CONFIGS["all"])
    save_adapter(model, tmp_path / "a", base)
    names = load_file(tmp_path / "a" / WEIGHTS)
    assert names and all(".layers.1." in name for name in names)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert fields["layers_to_transform"] == [1] and fields["target_modules"] == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )


def test_fields_that_are_not_understood_but_harmless_survive(folder, base, tmp_path):
    edit(folder, peft_version="0.9", auto_mapping=None, qalora_group_size=8, inference_mode=False, from_the_future=None)
    save_adapter(from_pretrained(folder), tmp_path / "again", base)
    after = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert after == json.loads((folder / CONFIG).read_text()) | {"inference_mode": True}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_begins_with_a_part_of_the_base_is_written_for_the_original_base(init, base, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=3, init_lora_weights=init, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 1}
    )
    model = train_a_little(attach(from_pretrained(base), config))
    save_adapter(model, tmp_path / "a", base)
    again = from_pretrained(tmp_path / "a")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)
    config = active_config(again)
    assert config is not None and (config.r, config.init, config.rank_pattern) == (8, "default", {"v_proj": 4})
    ranks = {path: part.ranks for path, part in active_parts(again).items()}
    assert ranks == {"layers.attention.query.adapter": (8, 8), "layers.attention.value.adapter": (4, 4)}


def test_experts(tmp_path):
    model = make_moe()
    save_pretrained(model, None, tmp_path / "base")
    train_a_little(attach(model, LoraConfig(r=3, target_modules="all-linear")))
    save_adapter(model, tmp_path / "a", str(tmp_path / "base"))
    np.testing.assert_allclose(logits(from_pretrained(tmp_path / "a")), logits(model), atol=1e-5)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    experts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert fields["target_parameters"] == [*experts, "mlp.gate.weight"] and fields["rank_pattern"] == {
        "gate_up_proj": 6
    }


def test_the_former_names_of_experts_are_read(tmp_path):
    model, config = make_moe(), LoraConfig(r=3, target_modules=["up_proj"])
    save_pretrained(model, None, tmp_path / "base")
    train_a_little(attach(model, config))
    save_adapter(model, tmp_path / "a", str(tmp_path / "base"))
    part = active_parts(model)["layers.mlp.experts.up.adapter"]
    tensors = {}
    for layer, expert in np.ndindex(2, 4):
        name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.up_proj"
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(part.lora_a[layer, expert].T)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(part.lora_b[layer, expert].T)
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    edit(tmp_path / "a", target_modules=["up_proj"], target_parameters=None, rank_pattern={}, alpha_pattern={})
    np.testing.assert_allclose(logits(from_pretrained(tmp_path / "a")), logits(model), atol=1e-5)


def test_fusing_computes_the_same():
    rng = np.random.default_rng(0)
    parts, names = {}, ("x", "y")
    for name, outputs in zip(names, (Outputs(0, 3), Outputs(3, 8)), strict=True):
        a, b = rng.normal(size=(4, 6, 2)), rng.normal(size=(4, 2, outputs.stop - outputs.start))
        parts[Target(name, "adapter", "fused", outputs)] = Part(a, b)
    together = fused(parts, 8)
    expected = np.concatenate([part.a @ part.b for part in parts.values()], axis=-1)
    np.testing.assert_allclose(together.a @ together.b, expected)
    again = from_peft(*to_peft(together.a, together.b), 4)
    assert np.array_equal(again[0], together.a) and np.array_equal(again[1], together.b)


def test_a_reward_model(base, tmp_path):
    model = train_a_little(attach(from_pretrained(base, head="reward"), LORA))
    assert any(path == "head.adapter" for path in active_parts(model))  # its new head is trained without being asked
    save_adapter(model, tmp_path / "a", base)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert fields["task_type"] == "SEQ_CLS" and fields["modules_to_save"] == ["score"]
    assert np.array_equal(logits(from_pretrained(tmp_path / "a", head="reward")), logits(model))
    assert refusal(tmp_path / "a").endswith('is the adapter of a reward model; load it with head="reward"')


def test_an_embedding_that_grew_comes_with_its_adapter(base, tmp_path):
    model = resize_embeddings(from_pretrained(base), 333)
    train_a_little(attach(model, CONFIGS["saved"]))
    save_adapter(model, tmp_path / "a", base)
    again = from_pretrained(tmp_path / "a")
    assert again.config.vocab_size == 333 and np.array_equal(logits(again), logits(model))


def test_on_a_mesh_and_in_another_dtype(folder):
    mesh, alone = make_mesh("fsdp=4,tensor=2"), from_pretrained(folder)
    exact, rough = from_pretrained(folder, mesh=mesh), from_pretrained(folder, mesh=mesh, dtype="bfloat16")
    part = active_parts(rough)["layers.mlp.down.adapter"]
    assert part.lora_a[...].dtype == jnp.float32 and part.lora_a[...].sharding.spec[1] == "tensor"
    expected = np.asarray(logits(alone))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(exact), expected, atol=1e-4)
        assert 1e-4 < np.abs(np.asarray(logits(rough)) - expected).max() < 0.5


def test_a_file_in_bfloat16_is_held_in_float32(folder):
    before = active_parts(from_pretrained(folder))
    edit_tensors(folder, lambda tensors: {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()})
    for path, part in active_parts(from_pretrained(folder)).items():
        assert np.array_equal(part.lora_a[...], before[path].lora_a[...].astype(jnp.bfloat16).astype(jnp.float32))


def test_from_a_mesh_the_same_bytes_are_written(folder, base, tmp_path):
    mesh = make_mesh("fsdp=4,tensor=2")
    save_adapter(from_pretrained(folder, mesh=mesh), tmp_path / "again", base)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_loaded_adapter_can_be_trained_on_and_switched(folder, base):
    model = load_adapter(from_pretrained(base), folder, "old")
    assert jax.tree.leaves(nnx.state(model, trainable_filter(model)))
    plain = logits(from_pretrained(base))
    assert not np.array_equal(logits(model), plain)
    assert np.array_equal(logits(set_adapter(model, None)), plain)
    with pytest.raises(ConfigError, match="has no adapter to save; use save_pretrained for the whole model"):
        save_adapter(model, folder, base)
    with pytest.raises(ConfigError, match="holds a model, not an adapter"):
        load_adapter(model, base)


def test_the_tokenizer_beside_it(folder, base, tokenizer, tmp_path):
    adapter = open_adapter(folder)
    assert adapter is not None and adapter.tokenizer() is None and adapter.base == base
    save_adapter(from_pretrained(folder), tmp_path / "a", base, tokenizer=tokenizer)
    adapter = open_adapter(tmp_path / "a")
    assert adapter is not None and adapter.tokenizer().chat_template == tokenizer.chat_template
    assert open_adapter(base) is None


def test_an_adapter_and_a_model_take_each_others_place(folder, base, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "metrics.jsonl").write_text("{}")
    merged = merge_adapter(from_pretrained(folder))
    for _ in range(2):
        save_adapter(from_pretrained(folder), target, base)
        assert {path.name for path in target.iterdir()} == {CONFIG, WEIGHTS, "metrics.jsonl"}
        save_pretrained(merged, None, target)
        assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", "metrics.jsonl"}


def test_an_interruption_leaves_what_was_there(folder, base, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = train_a_little(from_pretrained(folder))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_adapter(model, folder, base)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        save_adapter(model, folder / CONFIG, base)
