"""Opening safetensors files: sound ones as the library reads them, damaged ones with a reason."""

import json
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpost.models.safetensors_file import MAX_JSON_BYTES, map_safetensors
from tests.models.test_checkpoint import TERABYTE, lean_refusal, refusal, sparse


def entry(shape=(1,), offsets=(0, 4), dtype="F32", **more):
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def safetensors_bytes(header, data=bytes(4)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TWICE = b'{"a": %(e)s, "a": %(e)s}' % {b"e": json.dumps(entry()).encode()}
DAMAGED = {
    "empty": (b"", "it has 0 bytes"),
    "no header": (bytes(7), "it has 7 bytes"),
    "text": (b"<!DOCTYPE html>" * 10, "its header takes .* but it has 150 in all, so it is incomplete"),
    "endless header": (b"\xff" * 8 + bytes(8), "its header takes 18446744073709551615 bytes"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "'utf-8' codec can't decode"),
    "not JSON": (safetensors_bytes(b"{'a': 1}"), "Expecting property name"),
    "no object": (safetensors_bytes([entry()]), "expected a JSON object, found list"),
    "nested": (safetensors_bytes(b'{"a":' * 100_000), "nested too deeply"),
    "tensor twice": (safetensors_bytes(TWICE), "holds the key a twice"),
    "field twice": (safetensors_bytes(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "holds the key dtype twice"),
    "name of two lines": (safetensors_bytes({"a\nb": entry()}), "'a.nb', which is no name"),
    "endless name": (safetensors_bytes({"a" * 1000: entry()}), "which is no name"),
    "entry that is a list": (safetensors_bytes({"a": [1]}), "the entry of tensor a does not consist of"),
    "entry without a field": (safetensors_bytes({"a": {"dtype": "F32"}}), "the entry of tensor a does not consist of"),
    "entry with one more": (safetensors_bytes({"a": entry(more=1)}), "the entry of tensor a does not consist of"),
    "many tensors": (safetensors_bytes(dict.fromkeys(map(str, range(70_000)), 1)), "it announces 70000 tensors"),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__ does not map"),
    "dtype that is a list": (
        safetensors_bytes({"a": {**entry(), "dtype": ["F32"]}}),
        "dtype of tensor a is not a name",
    ),
    "dtype of two lines": (safetensors_bytes({"a": entry(dtype="F32\n")}), "dtype of tensor a is not a name"),
    "negative size": (safetensors_bytes({"a": entry([-1])}), "shape of tensor a is not"),
    "no elements": (safetensors_bytes({"a": entry([0, 2**62, 2**62], [0, 0])}), "shape of tensor a is not"),
    "fraction of a size": (safetensors_bytes({"a": entry([1.0])}), "shape of tensor a is not"),
    "truth for a size": (safetensors_bytes({"a": entry([True])}), "shape of tensor a is not"),
    "NaN for a size": (safetensors_bytes({"a": entry([float("nan")])}), "shape of tensor a is not"),
    "many dimensions": (safetensors_bytes({"a": entry([1] * 100)}), "shape of tensor a is not"),
    "large size": (safetensors_bytes({"a": entry([2**61])}), "does not take 4 bytes"),
    "overflowing sizes": (safetensors_bytes({"a": entry([2**32, 2**32 + 1])}), "does not take 4 bytes"),
    "size over 64 bits": (safetensors_bytes({"a": entry([2**64 + 1])}), "does not take 4 bytes"),
    "endless digits": (safetensors_bytes(b'{"a": ' + b"9" * 100_000 + b"}"), "holds a number of 100000 digits"),
    "one offset": (safetensors_bytes({"a": entry(offsets=[4])}), "data_offsets of tensor a are not"),
    "negative offset": (safetensors_bytes({"a": entry(offsets=[-4, 0])}), "data_offsets of tensor a are not"),
    "reversed offsets": (safetensors_bytes({"a": entry(offsets=[4, 0])}), "does not take -4 bytes"),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)), "tensor b .* overlaps another one"),
    "hole": (safetensors_bytes({"a": entry(offsets=[4, 8])}, bytes(8)), "tensor a .* leaves a hole"),
    "too short": (safetensors_bytes({"a": entry()}, bytes(3)), "take 4 bytes, but it has 3 only, so it is incomplete"),
    "too long": (safetensors_bytes({"a": entry()}, bytes(5)), "take 4 bytes, but it has 5"),
    "FP8": (safetensors_bytes({"a": entry([4], dtype="F8_E4M3")}), "a is stored as F8_E4M3; supported: F64, F32"),
    "integers": (safetensors_bytes({"a": entry(dtype="I32")}), "a is stored as I32; supported: F64, F32"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_with_its_reason(tmp_path, content, reason):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(map_safetensors, path)
    assert message.startswith(f"{path}: ") and re.search(reason, message)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ((TERABYTE // 2).to_bytes(8, "little"), f"takes {TERABYTE // 2} bytes; at most {MAX_JSON_BYTES} are read"),
        (safetensors_bytes({"a": entry([TERABYTE], [0, 4 * TERABYTE])}, b""), "so it is incomplete"),
        (safetensors_bytes({"a": entry()}, b""), "its tensors take 4 bytes, but it has"),
    ],
    ids=["header", "tensor", "rest"],
)
def test_what_a_huge_file_announces_is_not_taken_into_memory(tmp_path, start, reason):
    sparse(tmp_path / "model.safetensors", start)
    assert reason in lean_refusal(map_safetensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["absent", ""])
def test_what_is_no_file_is_refused(tmp_path, name):
    assert str(tmp_path / name) in refusal(map_safetensors, tmp_path / name)


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        kind: random.normal(size=shape).astype(kind)
        for kind, shape in (("float64", (3,)), ("float32", (2, 5)), ("float16", ()), ("bfloat16", (1, 2, 3)))
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = map_safetensors(tmp_path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys() and ours["bfloat16"].dtype == ml_dtypes.bfloat16
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert tensor.tobytes() == theirs[name].tobytes()
