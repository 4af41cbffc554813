"""Damaged model folders: thousands of mutants of a sound one load or are refused in jaxpost's own words.

Each goes through all that `from_pretrained` does but the search for weights that are not finite; one array stands for
all shards.
"""

import json
import random
import re
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxpost import from_pretrained
from jaxpost.errors import ConfigError, JaxpostError
from jaxpost.models.adapters import attach
from jaxpost.models.checkpoint import open_checkpoint
from jaxpost.models.hf import load
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.peft import save_adapter
from jaxpost.models.peft_folder import open_adapter
from jaxpost.models.peft_read import read_parts
from jaxpost.models.safetensors_file import map_safetensors
from tests.soon import soon

MUTANTS = 2000
INDEX = "model.safetensors.index.json"
# The fields of a Llama's config.json that its parameters' shapes depend on.
SHAPES = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias"),
]
# What tends to hurt a parser: extremes, other types, deep nesting, names that lead elsewhere, halves of characters.
VALUES = [
    *(b"0", b"-1", b"1e999", b"NaN", b"-Infinity", b"0.5", b"9" * 19, b"9" * 40, b"9" * 5000, b"true", b"null"),
    *(b'""', b'"llama"', b"[]", b"{}", b"[[1]]", b"[" * 100_000, b'{"a":' * 50_000, b'"../x"', b'"/dev/zero"'),
    *(b'"\\ud800"', b'"\\u0000"', b'"\\n"', b"\xff\xfe", b"\x00", b"\xef\xbb\xbf", b'"F8_E4M3"', b'"I64"', b",", b":"),
]


def mutate(content, rng):
    """A copy of `content` with one to three random edits."""
    mutant = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at, few = rng.randrange(len(mutant) + 1), rng.choice([1, 1, 2, 8, 100])
        match rng.choice(["flip", "insert", "delete", "truncate", "splice", "number", "number", "value", "value"]):
            case "flip":
                mutant[at : at + 1] = bytes([rng.choice([0, 0x22, 0x7F, 0xFF, rng.randrange(256)])])
            case "insert":
                mutant[at:at] = rng.randbytes(few)
            case "delete":
                del mutant[at : at + few]
            case "truncate":
                del mutant[at:]
            case "splice":
                start = rng.randrange(len(mutant) + 1)
                mutant[at : at + rng.choice([0, few])] = mutant[start : start + few]
            case "number" if numbers := list(re.finditer(rb"\d+", mutant)):
                mutant[slice(*rng.choice(numbers).span())] = b"%d" % rng.choice([0, 1, 3, 2**31, 10**9, 2**63, 2**64])
            case "value" if values := list(re.finditer(rb'(?<=[:,\[])\s*("[^"]*"|[^",:\[\]{}]+)', mutant)):
                mutant[slice(*rng.choice(values).span())] = rng.choice(VALUES)
    return bytes(mutant)


def mutate_safetensors(content, rng):
    """A mutant whose header is as long as its first eight bytes say, or one that was changed anywhere."""
    start = 8 + int.from_bytes(content[:8], "little")
    match rng.choice(["header", "header", "header", "length and header", "file"]):
        case "header":
            header = mutate(content[8:start], rng)
            return len(header).to_bytes(8, "little") + header + content[start:]
        case "length and header":
            return mutate(content[:start], rng) + content[start:]
    return mutate(content, rng)


class Loader:
    """`from_pretrained` without its two slow parts: tracing a model of sizes seen before, and a device's memory."""

    def __init__(self, monkeypatch):
        self._trace, self._traced, self._sizes = nnx.eval_shape, {}, ""
        monkeypatch.setattr(nnx, "eval_shape", self._eval_shape)
        monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, _, read: jnp.asarray(read(whole(shape))))

    def _eval_shape(self, build):
        if self._sizes not in self._traced:
            self._traced[self._sizes] = self._trace(build)
        return self._traced[self._sizes]

    def __call__(self, folder):
        checkpoint = open_checkpoint(folder)
        self._sizes = repr([checkpoint.config.get(name) for name in SHAPES])
        return load(checkpoint, str(folder), allow_nonfinite=True)  # the check is compiled for every shape


def whole(shape):
    return (slice(None),) * len(shape)


def outcomes(attempt, path, change):
    """How many mutants of the file at `path` load, and how many are refused; any other error fails the test."""
    counts = Counter()
    with open(path, "r+b") as file:
        content = file.read()
        for seed in range(MUTANTS):
            mutant = change(content, random.Random(seed))
            file.seek(0)
            file.write(mutant)
            file.truncate()
            file.flush()
            told = f"mutant {seed} of {path.name}: {mutant[:4000]!r}"
            with soon(told):
                counts[outcome(attempt, path, told)] += 1
    return counts


def outcome(attempt, path, mutant):
    try:
        attempt(path.parent)
    except JaxpostError as error:
        assert isinstance(error, ConfigError) and "\n" not in str(error) and len(str(error)) < 1000, mutant
        return "refused"
    except Exception as error:
        raise AssertionError(mutant) from error
    return "loaded"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, tmp_path)
    return tmp_path


def test_mutants_of_a_config_load_or_are_refused(folder, monkeypatch):
    counts = outcomes(Loader(monkeypatch), folder / "config.json", mutate)
    assert counts["loaded"] > 20 and counts["refused"] > 500, counts


def test_mutants_of_safetensors_load_or_are_refused(folder, monkeypatch):
    """What loads is a valid file for the library too, with the same tensors in it."""
    loader, path = Loader(monkeypatch), folder / "model.safetensors"

    def attempt(folder):
        loader(folder)
        with safetensors.safe_open(path, framework="numpy") as theirs:
            shapes = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118
        assert shapes == {name: tensor.shape for name, tensor in map_safetensors(path).items()}

    counts = outcomes(attempt, path, mutate_safetensors)
    assert counts["loaded"] > 20 and counts["refused"] > 500, counts


def test_mutants_of_an_index_load_or_are_refused(folder, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 100}, "weight_map": weight_map}))
    counts = outcomes(Loader(monkeypatch), folder / INDEX, mutate)
    assert counts["loaded"] > 20 and counts["refused"] > 500, counts


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_mutants_of_an_adapter_load_or_are_refused(tiny_folder, tmp_path, name):
    model = from_pretrained(str(tiny_folder))
    save_adapter(
        attach(model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0])), tmp_path, str(tiny_folder)
    )

    def attempt(folder):
        opened = open_adapter(folder)
        assert opened is not None
        assert opened.base and read_parts(model, opened)

    counts = outcomes(attempt, tmp_path / name, mutate if name.endswith("json") else mutate_safetensors)
    assert counts["loaded"] > 20 and counts["refused"] > 500, counts
