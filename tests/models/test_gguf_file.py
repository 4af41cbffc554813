"""Opening GGUF files: sound ones as the gguf package reads them, damaged ones with a reason."""

import random
import struct
import sys

import gguf
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.gguf import GGUFCheckpoint
from jaxpost.models.gguf_file import open_gguf
from tests.models.test_gguf import SPECIAL, byte_level_keys, sentencepiece_keys, write_llama


@pytest.mark.parametrize("alignment", [32, 256])
def test_metadata_and_tensors_are_those_of_the_reference_reader(tmp_path, alignment):
    numbers = {"general.alignment": alignment, "a.bool": True, "a.float": 0.1, "a.list": [7, -3], "a.text": "é"}
    path = write_llama(tmp_path / "m.gguf", numbers, kind=gguf.GGMLQuantizationType.Q4_1)
    metadata, tensors = open_gguf(path)
    reader = gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert metadata.unread("") == sorted(key for key in theirs if key != "split.count")
    for key, value in theirs.items():
        kind = type(value)
        found = metadata.array(key, type(value[0])) if kind is list else metadata.get(key, kind)
        assert found == value, key
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist())) and ours.kind == tensor.tensor_type
        assert ours.data.tobytes() == tensor.data.tobytes()


def header(num_tensors, num_keys, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + body


def string(text):
    return struct.pack("<Q", len(text)) + text


def tensor_entry(dims, kind=0, offset=0):
    return string(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ENDLESS_ARRAY = string(b"key") + struct.pack("<IIQ", 9, 0, 2**62)
DAMAGED = {
    "empty": (b"", "not a readable GGUF file"),
    "text": (b"<!DOCTYPE html>" * 10, "does not start with the letters GGUF"),
    "only the magic": (b"GGUF", "inside of its header"),
    "big endian": (header(0, 0, version=3 << 24), "format version 50331648"),
    "endless array": (header(0, 1, ENDLESS_ARRAY), "inside of its header"),
    "array beyond the end": (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 10, 1000)), "inside of its header"),
    "key twice": (header(0, 2, 2 * (string(b"k") + struct.pack("<IB", 0, 1))), "holds k twice"),
    "tensor twice": (header(2, 0, 2 * tensor_entry([1])) + bytes(64), "two of its tensors have the same name"),
    "no dimension": (header(1, 0, tensor_entry([])), "tensor t announces 0 dimensions"),
    "alignment": (header(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 48)), "not a power of two"),
    "nested arrays": (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
    "endless string": (header(0, 1, struct.pack("<Q", 2**64 - 1)), "inside of its header"),
    "many keys": (header(0, 2**63), "inside of its header"),
    "many tensors": (header(2**63, 0), "announces 9223372036854775808 tensors"),
    "many dimensions": (header(1, 0, string(b"t") + struct.pack("<I", 2**31)), "2147483648 dimensions"),
    "overflowing size": (header(1, 0, tensor_entry([2**32, 2**32])), "tensor t lies beyond the end of the file"),
    "far offset": (header(1, 0, tensor_entry([1], offset=2**40)), "tensor t lies beyond the end of the file"),
    "unknown quantisation": (header(1, 0, tensor_entry([1], kind=77)), "quantisation type 77"),
    "not UTF-8": (header(0, 1, string(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "not a readable GGUF file"),
    "no architecture": (header(0, 0), "no general.architecture"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_refused_with_its_reason(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        GGUFCheckpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_work_on_a_header_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxpost.models.gguf_file._MAX_STRINGS", 100)
    path = tmp_path / "m.gguf"
    path.write_bytes(header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 8, 2**62) + bytes(8 * 1000)))
    with pytest.raises(ConfigError, match="over 100 strings"):
        GGUFCheckpoint(path)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            GGUFCheckpoint(path)


def test_an_incomplete_download_is_refused_at_any_length(tmp_path):
    content = write_llama(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    for length in [*range(0, 200, 7), *range(200, len(content), 9973), len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match="not a readable GGUF file"):
            GGUFCheckpoint(path)


def mutants(content, header_size, count, seed):
    """Yield copies of `content` with one to four bytes of the header changed, often to an extreme value."""
    rng = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(header_size)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        yield bytes(mutant)


def small_keys():
    """Tokenizer metadata that is small beside the rest of the header, so that mutations hit everything."""
    return byte_level_keys([*SPECIAL, *"abcdef", "ab", "abc"], ["a b", "ab c"])


@pytest.mark.parametrize("tokenizer", [small_keys(), sentencepiece_keys()], ids=["gpt2", "llama"])
def test_mutated_files_read_or_raise_config_error(tmp_path, tokenizer):
    content = write_llama(tmp_path / "m.gguf", tokenizer=tokenizer).read_bytes()
    header_size = gguf.GGUFReader(tmp_path / "m.gguf").data_offset
    path, refused = tmp_path / "mutant.gguf", 0
    for mutant in mutants(content, header_size, 100, seed=0):
        path.write_bytes(mutant)
        try:
            checkpoint = GGUFCheckpoint(path)
            for name in checkpoint.names():
                assert checkpoint.read(name).shape == checkpoint.shape(name)
            checkpoint.tokenizer()("abc def")
        except ConfigError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert 20 < refused < 100


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    path = write_llama(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxpost\[gguf\]'"):
        GGUFCheckpoint(path)
