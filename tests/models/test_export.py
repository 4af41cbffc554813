"""What an exported folder holds, and what becomes of the folder that was there."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import export
from jaxpost.models.export import parse_size
from tests.conftest import make_model

INDEX = "model.safetensors.index.json"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_shards_with_an_index_hold_what_one_file_holds(tmp_path):
    model = make_model(tie_word_embeddings=False)
    save_pretrained(model, None, tmp_path / "one")
    save_pretrained(model, None, tmp_path / "many", max_shard_size="50KB")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [name for name in names(tmp_path / "many") if name.endswith(".safetensors")]
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    assert all((tmp_path / "many" / file).stat().st_size < 60_000 for file in files)
    assert from_pretrained(tmp_path / "many").config == model.config


def test_an_old_model_goes_and_foreign_files_stay(tmp_path):
    out = tmp_path / "out"
    save_pretrained(make_model(), None, out, max_shard_size="20KB")
    (out / "notes.txt").write_text("mine")
    (out / "other.safetensors").write_bytes(b"foreign")
    save_pretrained(make_model(), None, out)
    assert names(out) == ["config.json", "model.safetensors", "notes.txt", "other.safetensors"]
    assert names(tmp_path) == ["out"]


def test_an_export_that_fails_leaves_the_old_model_and_no_other(tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_pretrained(make_model(), None, out)
    before = (out / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_weights", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_pretrained(make_model(num_hidden_layers=1), None, out)
    assert names(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("size", "count"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), (" 200 kb ", 200_000), (7, 7)])
def test_sizes_are_read_as_transformers_reads_them(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "5XB", "-1", 0, "0KB", "many"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)
