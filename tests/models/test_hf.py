"""Loading: every weight where it belongs, in little memory, and nothing taken on trust."""

import json
import shutil
from collections import Counter

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxpost import from_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models import hf
from jaxpost.models.checkpoint import open_checkpoint
from jaxpost.sharding import make_mesh
from tests.conftest import make_model

UP, EMBEDDING, HEAD, SCORE = (
    "model.layers.1.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "score.weight",
)


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def parameter(model, path):
    """One of the model's parameters, e.g. `head.kernel`."""
    return np.asarray(dict(nnx.to_flat_state(nnx.state(model)))[tuple(path.split("."))][...])


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, **changes):
    """Change tensors by name, or take them out with None."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def refusal(*args, **options):
    """The message of the error that loading raises."""
    with pytest.raises(ConfigError) as caught:
        from_pretrained(*args, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2", "data=2,tensor=4"])
def test_loading_onto_a_mesh_reads_the_same_weights(tiny_folder, mesh):
    plain, spread = from_pretrained(tiny_folder), from_pretrained(tiny_folder, mesh=make_mesh(mesh))
    for a, b in zip(leaves(plain), leaves(spread), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = nnx.to_pure_dict(nnx.state(spread))["layers"]["mlp"]["up"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == (8 if "fsdp" in mesh else 4)


def test_each_file_may_have_dtypes_of_its_own_and_all_are_cast(folder):
    tensors = load_file(folder / "model.safetensors")
    dtypes = [np.float32, ml_dtypes.bfloat16, np.float16, np.float64]
    mixed = {name: value.astype(dtypes[i % 4]) for i, (name, value) in enumerate(sorted(tensors.items()))}
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(mixed)[:9], sorted(mixed)[9:])):
        save_file({name: mixed[name] for name in names}, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(names, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for dtype in ("float32", "bfloat16", "float16"):
        model = from_pretrained(folder, dtype=dtype, mesh=make_mesh("fsdp=4,tensor=2"))
        np.testing.assert_array_equal(parameter(model, "layers.mlp.up.kernel")[1].T, mixed[UP].astype(dtype))
        np.testing.assert_array_equal(parameter(model, "embed.embedding"), mixed[EMBEDDING].astype(dtype))


class Counting:
    """A checkpoint that counts how often each tensor is read."""

    def __init__(self, folder):
        self._checkpoint = open_checkpoint(folder)
        self.config, self.generation_config = self._checkpoint.config, {}
        self.names, self.shape, self.tokenizer = (
            self._checkpoint.names,
            self._checkpoint.shape,
            self._checkpoint.tokenizer,
        )
        self.reads = Counter()

    def read(self, name):
        self.reads[name] += 1
        return self._checkpoint.read(name)


def test_each_tensor_is_read_once_and_each_shard_takes_only_its_slice(tiny_folder, monkeypatch):
    checkpoint, taken, copy = Counting(tiny_folder), [], hf.copy
    monkeypatch.setattr(hf, "copy", lambda target, source: (taken.append(source.shape), copy(target, source)))
    model = hf.load(checkpoint, "tiny", mesh=make_mesh("fsdp=4,tensor=2"))
    assert checkpoint.reads == dict.fromkeys(checkpoint.names(), 1)
    # 4 x 2 shards of each kernel of each of the 2 layers; norms are whole, once for all devices.
    slices = {(32 // 4, 64 // 2): 3 * 16, (64 // 2, 32 // 4): 2 * 16, (32 // 4, 32 // 2): 2 * 16, (160, 8): 8, (32,): 5}
    assert Counter(taken) == slices
    assert parameter(model, "layers.mlp.up.kernel").shape == (2, 32, 64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", [None, "fsdp=8"])
def test_weights_that_are_not_finite_are_refused_by_name(folder, bad, mesh):
    value = load_file(folder / "model.safetensors")[UP]
    value[-1, -1] = bad
    edit_weights(folder, **{UP: value, "model.norm.weight": np.full(32, bad, np.float32)})
    mesh = mesh and make_mesh(mesh)
    message = refusal(folder, mesh=mesh)
    assert message.startswith(f"{folder}: NaN or infinity (in float32) in {UP}, model.norm.weight; ")
    model = from_pretrained(folder, mesh=mesh, allow_nonfinite=True)
    np.testing.assert_array_equal(parameter(model, "layers.mlp.up.kernel")[1].T, value)


def test_weights_that_overflow_when_cast_are_refused(folder):
    edit_weights(folder, **{UP: np.full((64, 32), 1e5, np.float32)})
    assert len(leaves(from_pretrained(folder, dtype="bfloat16"))) == 11
    assert f"NaN or infinity (in float16) in {UP};" in refusal(folder, dtype="float16")


def test_a_tied_head_in_the_file_must_be_the_embedding(folder):
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    edit_weights(folder, **{HEAD: embedding.copy()})
    assert from_pretrained(folder).head is None
    other = embedding.copy()
    other[-1, -1] += 1e-3
    for head in (other, embedding[:-1].copy()):
        edit_weights(folder, **{HEAD: head})
        assert "lm_head.weight differs from model.embed_tokens.weight; set tie_word_embeddings" in refusal(folder)
    edit(folder / "config.json", tie_word_embeddings=False)
    edit_weights(folder, **{HEAD: other})
    np.testing.assert_array_equal(parameter(from_pretrained(folder), "head.kernel").T, other)


def test_a_language_model_becomes_a_reward_model_with_a_new_head(folder, caplog):
    edit(folder / "config.json", hidden_size=32, initializer_range=0.5)
    with caplog.at_level("INFO", "jaxpost"):
        model = from_pretrained(folder, head="reward")
    assert f"{folder} has no score.weight: its reward head is new, normal with deviation 0.5" in caplog.messages
    head = parameter(model, "head.kernel")
    assert head.shape == (32, 1) and 0.25 < head.std() < 1
    np.testing.assert_array_equal(model.embed.embedding[...], from_pretrained(folder).embed.embedding[...])
    spread = from_pretrained(folder, head="reward", mesh=make_mesh("fsdp=8"), dtype="bfloat16")
    np.testing.assert_array_equal(head.astype(ml_dtypes.bfloat16), parameter(spread, "head.kernel"))
    assert model(np.array([[3, 4, 5]])).shape == (1, 3)
    # An untied head is not needed then; a model that calls itself a classifier does need its own.
    edit(folder / "config.json", tie_word_embeddings=False)
    edit_weights(folder, **{HEAD: np.ones((320, 32), np.float32)})
    np.testing.assert_array_equal(head, parameter(from_pretrained(folder, head="reward"), "head.kernel"))
    edit(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    assert "missing: score.weight" in refusal(folder, head="reward")


def test_the_deviation_of_a_new_head_has_a_default_and_must_be_a_number(folder):
    assert 0.01 < parameter(from_pretrained(folder, head="reward"), "head.kernel").std() < 0.04
    edit(folder / "config.json", initializer_range="wide")
    assert "initializer_range = 'wide', expected float" in refusal(folder, head="reward")


def test_a_reward_model_is_loaded_as_what_it_is(folder):
    score = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    edit_weights(folder, **{SCORE: score})
    np.testing.assert_array_equal(parameter(from_pretrained(folder, head="reward"), "head.kernel").T, score)
    remedy = 'give a language model, or load it with head="reward"'
    assert refusal(folder) == f"{folder} is a reward model (it has score.weight); {remedy}"
    edit_weights(folder, **{SCORE: np.ones((3, 32), np.float32)})
    assert "wrong shape: score.weight [3, 32] instead of [1, 32]" in refusal(folder, head="reward")
    edit(folder / "config.json", model_type="granite")
    assert "transformers has no reward model of the family granite" in refusal(folder, head="reward")
    assert "head is 'rewards' (did you mean 'reward'?)" in refusal(folder, head="rewards")


def test_sharded_index_is_read(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert len(leaves(from_pretrained(folder))) == len(leaves(make_model()))
    index["weight_map"][names[0]] = "../one.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"\.\./one\.safetensors.* is not a file of this folder"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"logit_magic": 3}, "logit_magic = 3"),
        ({"hidden_act": "gelo"}, "hidden_act 'gelo' is not supported"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rotary type 'spiral'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}, "wobble = 1"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"hidden_size": "32"}, "hidden_size = '32', expected int"),
        ({"hidden_size": 0}, "expected a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, r"missing: model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unexpected: model\.layers\.1"),
        ({"num_hidden_layers": 4000}, "asks for 4000 tensors of one kind, the files hold 20 in all"),
        ({"intermediate_size": 48}, r"wrong shape: .*\[64, 32\] instead of \[48, 32\]"),
    ],
)
def test_config_that_does_not_fit_is_named(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(folder)


def test_folders_that_hold_no_model(folder, tmp_path):
    with pytest.raises(ConfigError, match="neither a local folder nor"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="does not exist"):
        from_pretrained(tmp_path / "nothing.gguf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable JSON"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        from_pretrained(folder)


def test_damaged_weights_are_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ConfigError, match="not a valid safetensors file"):
        from_pretrained(folder)
