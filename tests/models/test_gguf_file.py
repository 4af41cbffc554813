"""Opening GGUF files: sound ones as the gguf package reads them, damaged ones with a reason."""

import struct
import sys

import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.gguf import GGUFCheckpoint
from jaxpost.models.gguf_file import open_gguf
from tests.models.gguf_files import Q, gguf, write_model


@pytest.mark.parametrize("alignment", [32, 256])
def test_metadata_and_tensors_are_those_of_the_reference_reader(tmp_path, alignment):
    numbers = {"general.alignment": alignment, "a.bool": True, "a.float": 0.1, "a.list": [7, -3], "a.text": "é"}
    path = write_model(tmp_path / "m.gguf", numbers, kind=Q.Q4_1)
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


def tensor_entry(dims, kind=0, offset=0, name=b"t"):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


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
    "empty tensor": (header(1, 0, tensor_entry([0])), "tensor t announces a dimension of 0"),
    "overlap": (header(2, 0, tensor_entry([8]) + tensor_entry([8], offset=28, name=b"u")) + bytes(96), "u overlaps"),
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
    content = write_model(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    for length in [*range(7, 200, 7), *range(200, len(content), 9973), len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r"not a readable GGUF file .*incomplete"):
            GGUFCheckpoint(path)


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxpost\[gguf\]'"):
        GGUFCheckpoint(path)
