import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import ConfigError
from jaxpost.sharding import make_mesh
from tests.conftest import TINY_LLAMA, make_model


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
def test_round_trip_is_bit_equal(tmp_path, changes):
    model = make_model(**changes)
    save_pretrained(model, None, tmp_path / "a")
    again = from_pretrained(tmp_path / "a")
    for a, b in zip(leaves(model), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    save_pretrained(again, None, tmp_path / "b")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert "lm_head.weight" in one or not changes
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2", "data=2,tensor=4"])
def test_loading_onto_a_mesh_reads_the_same_weights(tiny_folder, mesh):
    plain, spread = from_pretrained(tiny_folder), from_pretrained(tiny_folder, mesh=make_mesh(mesh))
    for a, b in zip(leaves(plain), leaves(spread), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = spread.layers.mlp.up.kernel[...]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == (8 if "fsdp" in mesh else 4)


def test_export_from_a_mesh_equals_the_source(tiny_folder, tmp_path):
    save_pretrained(from_pretrained(tiny_folder, mesh=make_mesh("fsdp=4,tensor=2")), None, tmp_path / "out")
    source, out = load_file(tiny_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(source[name], out[name]) for name in source)


def test_bfloat16_in_and_out(tiny_folder, tmp_path):
    save_pretrained(from_pretrained(tiny_folder, dtype="bfloat16"), None, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    original, half = from_pretrained(tiny_folder), from_pretrained(tmp_path / "half")
    for a, b in zip(leaves(original), leaves(half), strict=True):
        np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16).astype(np.float32), b)


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


def test_save_keeps_foreign_files_and_leaves_no_half_model(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    save_pretrained(make_model(), None, target)
    assert (target / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(ConfigError, match="is a file"):
        save_pretrained(make_model(), None, target / "notes.txt")


def test_config_json_survives(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    assert {name: config[name] for name in TINY_LLAMA} == TINY_LLAMA
