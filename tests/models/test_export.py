"""Exporting: the same weights, in files that every reader of safetensors and transformers takes."""

import json
import os
import re
import resource
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models.checkpoint import read_json
from jaxpost.models.export import parse_size
from jaxpost.sharding import make_mesh
from tests.conftest import TINY_LLAMA, make_model

INDEX = "model.safetensors.index.json"


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def stored(folder):
    """All tensors of a folder."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        np.testing.assert_array_equal(value, other[name], err_msg=name)


UNTIED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("changes", [{}, UNTIED])
def test_round_trip_is_bit_equal(tmp_path, changes):
    model = make_model(**changes)
    save_pretrained(model, None, tmp_path / "a")
    again = from_pretrained(tmp_path / "a")
    for a, b in zip(leaves(model), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    save_pretrained(again, None, tmp_path / "b")
    assert_equal(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert ("lm_head.weight" in stored(tmp_path / "a")) == bool(changes)


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2", "data=2,tensor=4"])
def test_export_from_a_mesh_equals_the_source(tiny_folder, tmp_path, mesh, monkeypatch):
    monkeypatch.setattr("jaxpost.models.export.BLOCK_BYTES", 5000)  # several blocks a tensor, and none of its parts
    save_pretrained(from_pretrained(tiny_folder, mesh=make_mesh(mesh)), None, tmp_path / "out")
    assert_equal(stored(tiny_folder), stored(tmp_path / "out"))


def test_bfloat16_in_and_out(tiny_folder, tmp_path):
    save_pretrained(from_pretrained(tiny_folder, dtype="bfloat16"), None, tmp_path / "half")
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"
    before, after = stored(tiny_folder), stored(tmp_path / "half")
    assert_equal({name: value.astype(ml_dtypes.bfloat16) for name, value in before.items()}, after)


def test_shards_and_their_index(tiny_folder, tmp_path):
    model = make_model(**UNTIED)
    save_pretrained(model, None, tmp_path / "whole")
    save_pretrained(model, None, tmp_path / "parts", max_shard_size="30KB")
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index, whole = read_json(tmp_path / "parts" / INDEX), stored(tmp_path / "whole")
    for file in files:
        with safe_open(tmp_path / "parts" / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, listed in index["weight_map"].items() if listed == file}
            assert sum(whole[name].nbytes for name in opened.keys()) <= 30_000 or len(opened.keys()) == 1  # noqa: SIM118
    assert len(files) > 5 and max(value.nbytes for value in whole.values()) > 30_000
    assert_equal(whole, stored(tmp_path / "parts"))
    assert index["metadata"] == {
        "total_size": sum(value.nbytes for value in whole.values()),
        "total_parameters": sum(value.size for value in whole.values()),
    }
    for a, b in zip(leaves(model), leaves(from_pretrained(tmp_path / "parts")), strict=True):
        np.testing.assert_array_equal(a, b)
    size = index["metadata"]["total_size"]
    for limit, count in ((size, 1), (size - 1, 2)):
        save_pretrained(model, None, tmp_path / "parts", max_shard_size=limit)
        assert len(list((tmp_path / "parts").glob("*.safetensors"))) == count
        assert_equal(whole, stored(tmp_path / "parts"))


SIZES = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "200KB": 200_000, "1.5 tb": 15 * 10**11, " 7 ": 7, 12345: 12345}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    assert parse_size(size) == SIZES[size]


@pytest.mark.parametrize("size", ["5GiB", "GB", "-1GB", "", "0", 0, -5, True, "1e9", "0.1", "inf"])
def test_what_is_no_size_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=re.escape(f"max_shard_size is {size!r}; it takes a number of bytes or")):
        save_pretrained(make_model(), None, tmp_path / "out", max_shard_size=size)
    assert not any(tmp_path.iterdir())


def test_config_is_true_of_what_is_exported(tmp_path):
    code = {"AutoModelForCausalLM": "mine.Model"}
    model = make_model(torch_dtype="float16", auto_map=code, quantization_config=None, architectures=["Mine"])
    generation = {"eos_token_id": [1, 2], "temperature": 0.5}
    save_pretrained(model, None, tmp_path, generation_config=generation)
    config = read_json(tmp_path / "config.json")
    assert config == {**TINY_LLAMA, "dtype": "float32"}
    assert read_json(tmp_path / "generation_config.json") == generation


def test_a_reward_model_is_a_classifier_with_one_label(tiny_folder, tokenizer, tmp_path):
    model = from_pretrained(tiny_folder, head="reward")
    save_pretrained(model, tokenizer, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"} and config["label2id"] == {"LABEL_0": 0}
    assert config["pad_token_id"] == tokenizer.pad_token_id == 2
    before, after = stored(tiny_folder), stored(tmp_path / "out")
    assert after.pop("score.weight").shape == (1, 32)
    assert_equal(before, after)
    again = from_pretrained(tmp_path / "out", head="reward")
    for a, b in zip(leaves(model), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    save_pretrained(again, None, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == config


def test_the_tokenizer_and_its_template_are_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_pretrained(make_model(), tokenizer, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template and again.get_vocab() == tokenizer.get_vocab()


def test_other_files_stay_and_a_model_can_be_saved_where_it_came_from(tmp_path):
    save_pretrained(make_model(), None, tmp_path / "out", max_shard_size="30KB")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    model = from_pretrained(tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    save_pretrained(model, None, tmp_path / "link")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "notes.txt"]
    assert sorted(os.listdir(tmp_path)) == ["link", "out"] and (tmp_path / "link").is_symlink()
    for a, b in zip(leaves(make_model()), leaves(from_pretrained(tmp_path / "out")), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        save_pretrained(model, None, tmp_path / "out" / "notes.txt")


@pytest.fixture
def small_files():
    """No file of this process grows beyond 50 KB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_leaves_the_old_model(tmp_path, small_files):
    old, model = make_model(vocab_size=16), make_model()
    save_pretrained(old, None, tmp_path / "out", max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for target in ("out", "new"):
        with pytest.raises(CheckpointError, match=r"the model cannot be written \(.*File too large") as caught:
            save_pretrained(model, None, tmp_path / target)
        assert caught.value.exit_code == 78
    assert os.listdir(tmp_path) == ["out"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


PROCESS = """
import sys
import jax
address, rank, source, target = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
from jaxpost import from_pretrained, save_pretrained
from jaxpost.models import hf
from jaxpost.sharding import make_mesh
taken, copy = [], hf.copy
hf.copy = lambda target, source: (taken.append(source.size), copy(target, source))
model = from_pretrained(source, mesh=make_mesh("fsdp=4,tensor=2"))
save_pretrained(model, None, target, max_shard_size="30KB")
print(sum(taken))
"""


def test_two_processes_read_half_each_and_export_the_whole(tmp_path):
    save_pretrained(make_model(**UNTIED), None, tmp_path / "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    commands = [
        [sys.executable, "-c", PROCESS, address, str(rank), str(tmp_path / "a"), str(tmp_path / "b")] for rank in (0, 1)
    ]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
    counts = [int(process.communicate(timeout=100)[0].split()[-1]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert_equal(stored(tmp_path / "a"), stored(tmp_path / "b"))
    size = sum(value.size for value in stored(tmp_path / "a").values())
    assert counts[0] == counts[1] and size / 2 <= counts[0] < 0.52 * size  # vectors may be whole on each device


def test_config_json_survives(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    assert {name: config[name] for name in TINY_LLAMA} == TINY_LLAMA
