"""Damaged GGUF files: thousands of mutants of two small ones are read or refused, soon and in little memory."""

import random
import struct
import tracemalloc
from itertools import accumulate

import numpy as np
import pytest

from jaxpost.errors import ConfigError, JaxpostError
from jaxpost.models.gguf import GGUFCheckpoint
from tests.models.gguf_files import Q, Sizes, byte_level_keys, gemma_keys, gguf, write_model
from tests.soon import soon

MUTANTS = 1100  # of each file
# A block of 1.5 bits becomes 20 times as large as float32, in three copies; a string of one letter six times in Python.
MEMORY = 1 << 20, 80  # bytes, and bytes for each byte of the file
MEASURED = 8  # every so many mutants; measuring takes seven times as long as reading
SMALL = Sizes(embed=32, mlp=32, heads=2, kv_heads=1, head_dim=16, layers=1)
TEXT = "abc <end_of_turn>the\n\n"
EXTREMES = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def small_gemma_keys():
    """Gemma's tokenizer without most of its bytes, so that mutations hit everything."""
    keys = gemma_keys()
    kept = [at for at, token in enumerate(keys["tokenizer.ggml.tokens"]) if not token.startswith("<0x")]
    for name in ("tokens", "scores", "token_type"):
        keys[f"tokenizer.ggml.{name}"] = [keys[f"tokenizer.ggml.{name}"][at] for at in kept]
    return keys


FILES = {
    "llama": dict(tokenizer=byte_level_keys(["<a>", "<b>", "<c>", *"abcdef", "ab", "abc"], ["a b", "ab c"])),
    "gemma3": dict(tokenizer=small_gemma_keys(), kind=Q.Q4_1),
}


def places(path):
    """Where the pieces of each key and of each tensor's entry start, and where each tensor's data does."""
    reader = gguf.GGUFReader(path)
    entries = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
    sizes = [[part.nbytes for part in entry.parts] for entry in entries]
    pieces = [
        [entry.offset + before for before in accumulate(parts, initial=0)]
        for entry, parts in zip(entries, sizes, strict=True)
    ]
    return [*pieces, [tensor.data_offset for tensor in reader.tensors]]


def mutate(content, places, rng):
    """A copy of `content` with one to three random edits, mostly at one of its `places`."""
    mutant = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start, at = rng.choice(rng.choice(places)), rng.choice(rng.choice(places))
        if rng.random() < 0.3:
            at = rng.randrange(len(mutant) + 1)
        few = rng.choice([1, 2, 4, 8, 40])
        match rng.choice(["flip", "flip", "number", "number", "number", "insert", "delete", "splice", "truncate"]):
            case "flip":
                mutant[at : at + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])])
            case "number":
                width = rng.choice([4, 8])
                number = rng.choice([*EXTREMES, len(content), rng.randrange(300)])
                mutant[at : at + width] = struct.pack("<Q", number)[:width]
            case "insert":
                mutant[at:at] = rng.randbytes(few)
            case "delete":
                del mutant[at : at + few]
            case "splice":
                mutant[at : at + rng.choice([0, few])] = mutant[start : start + few]
            case "truncate" if rng.random() < 0.3:
                del mutant[at:]
    return bytes(mutant)


def attempt(path):
    """All that reading a file does; whether the file was read. Any error but a refusal in one line goes on."""
    try:
        checkpoint = GGUFCheckpoint(path)
        for name in checkpoint.names():
            weights = checkpoint.read(name)
            assert weights.dtype == np.float32 and weights.shape == checkpoint.shape(name)
        tokens = checkpoint.tokenizer()(TEXT)["input_ids"]
        assert all(0 <= token < checkpoint.config["vocab_size"] for token in tokens)
    except JaxpostError as error:
        assert isinstance(error, ConfigError) and str(path) in str(error)
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


def attempt_in_little_memory(path):
    """The same, with a bound on the memory at any time."""
    tracemalloc.start()
    try:
        outcome = attempt(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY[0] + MEMORY[1] * path.stat().st_size
    return outcome


@pytest.mark.parametrize("arch", FILES)
def test_mutants_are_read_or_refused_soon_and_in_little_memory(tmp_path, arch):
    path = write_model(tmp_path / "m.gguf", arch=arch, sizes=SMALL, **FILES[arch])
    assert attempt(path)
    content, edited, outcomes = path.read_bytes(), places(path), []
    for seed in range(MUTANTS):
        mutant = mutate(content, edited, random.Random(seed))
        path.write_bytes(mutant)
        try:
            with soon(f"mutant {seed} of {arch}"):
                outcomes.append(attempt(path) if seed % MEASURED else attempt_in_little_memory(path))
        except Exception as error:
            raise AssertionError(f"mutant {seed} of {arch}: {mutant[:200]!r}") from error
    assert 100 < sum(outcomes) < MUTANTS - 500
