"""Opening model folders that are damaged or hostile: each is refused with the file and the reason; none runs code."""

import json
import os
import pickle
import shutil
import signal
import tracemalloc
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from jaxpost import from_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models.checkpoint import load_tokenizer, open_checkpoint, read_json
from jaxpost.models.safetensors_file import MAX_JSON_BYTES

INDEX = "model.safetensors.index.json"
FILES = ["config.json", "generation_config.json", "model.safetensors", INDEX]
TERABYTE = 2**40


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def sharded(folder):
    """The folder with its tensors in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for file, part in (("one.safetensors", names[::2]), ("two.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def alarm():
    """Ends a test that hangs, rather than all of them."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(open_path, path):
    """The message of the error that opening `path` raises."""
    with pytest.raises(ConfigError) as caught:
        open_path(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def lean_refusal(open_path, path):
    """The same, where next to no memory may be taken."""
    tracemalloc.start()
    try:
        message = refusal(open_path, path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    return message


def sparse(path, start=b""):
    """A file of a terabyte that holds nothing but its start."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(TERABYTE)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_a_huge_json_file_is_not_read(folder, name):
    sparse(folder / name)
    reason = f"{folder / name}: not readable JSON (it has {TERABYTE} bytes; at most {MAX_JSON_BYTES} are read)"
    assert lean_refusal(open_checkpoint, folder) == reason


def test_a_billion_layers_are_refused_before_anything_is_built(folder):
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    assert "num_hidden_layers = 1000000000" in lean_refusal(from_pretrained, folder)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to nothing", "link to itself"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused(folder, name, kind, alarm):
    path = folder / name
    path.unlink(missing_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to({"device": "/dev/zero", "link to nothing": "nothing"}.get(kind, name))
    assert f"{path}: not a readable file" in refusal(open_checkpoint, folder)


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_that_leaves_the_folder_is_refused(folder, name):
    path, secret = folder / name, folder.parent / "secret"
    path.rename(secret) if path.exists() else secret.write_text("{}")
    path.symlink_to(secret)
    message = refusal(lambda folder: open_checkpoint(folder).tokenizer(), folder)
    assert message == f"{path}: a link to {secret}, outside of the model's folder; put the file itself there"


def test_links_within_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / "data").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).rename(folder / "data" / name)
        (folder / name).symlink_to(Path("data") / name)
    (tmp_path / "link").symlink_to(folder)
    checkpoint = open_checkpoint(tmp_path / "link")
    assert len(checkpoint.names()) == 20 and len(checkpoint.tokenizer()) == 259


def hub_cache(root, folder):
    """The hub's cache with the files of `folder`: snapshots link to blobs, and the weights' blob to a shared one."""
    repository = root / "models--someone--tiny"
    snapshot, blobs, shared = repository / "snapshots" / "0123", repository / "blobs", root / "blobs" / "ab"
    for place in (snapshot, blobs, shared):
        place.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            shutil.copy(file, shared / file.name)
            (blobs / file.name).symlink_to(Path("../../blobs/ab") / file.name)
        else:
            shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def test_a_snapshot_of_the_hubs_cache_links_to_blobs_and_to_nothing_else(tiny_folder, tmp_path):
    snapshot = hub_cache(tmp_path / "hub", tiny_folder)
    checkpoint = open_checkpoint(snapshot)
    assert len(checkpoint.names()) == 20 and len(checkpoint.tokenizer()) == 259
    other = hub_cache(tmp_path / "other", tiny_folder)
    for target in (other / "config.json", tiny_folder / "config.json", snapshot.parents[1] / "refs"):
        if not target.is_file():
            target.write_text("{}")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        assert "outside of the model's folder" in refusal(open_checkpoint, snapshot)


OUTSIDE = ["../one.safetensors", "sub/one.safetensors", "/one.safetensors", "./one.safetensors", "one.safetensors/"]
NO_NAMES = ["", ".", "..", "~", "one\0.safetensors", "x" * 5000 + ".safetensors"]


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file", [*OUTSIDE, *NO_NAMES, "none.safetensors", "config.json", "model.bin"])
def test_an_index_names_only_safetensors_files_of_its_folder(sharded, file):
    (sharded / "sub").mkdir()
    for place in (sharded / "sub", sharded.parent):
        shutil.copy(sharded / "one.safetensors", place)
    (sharded / "model.bin").write_bytes(b"")
    edit_index(sharded, lambda weights: weights.update(a=str(sharded / "one.safetensors") if file[:1] == "/" else file))
    assert "is not a file of this folder that ends in .safetensors" in refusal(open_checkpoint, sharded)


def test_an_index_lists_exactly_what_its_files_hold(sharded):
    assert len(open_checkpoint(sharded).names()) == 20
    edit_index(sharded, lambda weights: weights.update(more="one.safetensors"))
    assert f"{INDEX}: one.safetensors should hold tensor 'more', which it does not" in refusal(open_checkpoint, sharded)
    edit_index(sharded, lambda weights: [weights.pop(name) for name in ("more", "model.norm.weight")])
    assert f"holds tensor 'model.norm.weight', which {INDEX} does not list there" in refusal(open_checkpoint, sharded)


def test_a_tensor_that_two_files_hold_is_refused(sharded):
    one, two = (load_file(sharded / f"{name}.safetensors") for name in ("one", "two"))
    save_file(one | two, sharded / "two.safetensors")
    message = f"two.safetensors: holds tensor {min(one)!r} and 9 more, which {INDEX} does not list there"
    assert message in refusal(open_checkpoint, sharded)


def test_an_index_names_no_link_that_leaves_the_folder(sharded):
    (sharded / "one.safetensors").rename(sharded.parent / "one.safetensors")
    (sharded / "one.safetensors").symlink_to("../one.safetensors")
    assert "outside of the model's folder" in refusal(open_checkpoint, sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": ["one.safetensors"]}])
def test_a_weight_map_of_another_kind_is_refused(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map must map tensor names to file names" in refusal(open_checkpoint, sharded)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 2}', "it holds the key a twice"),
        (b'{"a": {"b": 1, "b": 1}}', "it holds the key b twice"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it holds a number of 5000 digits"),
        (b'{"\\n": 1}', "which is no name"),
        (b'{"a": ["\\uD83D\\uDE00", "\\uD83D"]}', "surrogates not allowed"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff\xfe{\x00}\x00", "'utf-8' codec can't decode"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_ambiguous_or_extreme_is_refused(tmp_path, text, reason):
    (tmp_path / "a.json").write_bytes(text)
    assert reason in refusal(read_json, tmp_path / "a.json")


def test_json_may_hold_floats_that_are_not_finite_and_pairs_of_surrogates(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [NaN, -Infinity, 1e999], "b": "\\uD83D\\uDE00"}')
    value = read_json(tmp_path / "a.json")
    assert str(value["a"]) == "[nan, -inf, inf]" and value["b"] == "\N{GRINNING FACE}"


class Payload:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_pickle_is_never_opened(folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert len(open_checkpoint(folder).names()) == 20
    (folder / "model.safetensors").unlink()
    message = f"{folder / name}: pickled weights can run code and are never opened; convert"
    assert refusal(open_checkpoint, folder).startswith(message)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("classes", [["hostile.Tokenizer", None], {"AutoTokenizer": [None, "hostile.Tokenizer"]}])
@pytest.mark.parametrize("known", [True, False])
def test_code_of_the_folder_is_never_run(folder, tmp_path, classes, known):
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Tokenizer: pass\n")
    config, settings = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    remote = {"auto_map": {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}}
    (folder / "config.json").write_text(json.dumps(config | remote | {"model_type": "llama" if known else "hostile"}))
    settings |= {"auto_map": classes, "tokenizer_class": settings["tokenizer_class"] if known else "HostileTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for attempt in (from_pretrained, load_tokenizer):
        try:
            attempt(folder)
        except ConfigError as error:
            assert "\n" not in str(error)
        else:
            assert known
    assert not (tmp_path / "ran").exists()


def test_a_panic_of_the_tokenizers_library_is_one_line(folder, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 raises it: no Exception, and of a class that cannot be imported."""

    def fail(error):
        def from_pretrained(*_, **__):
            raise error

        return from_pretrained

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail(PanicException("index\nout of range")))
    assert "(index out of range)" in refusal(load_tokenizer, folder)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(folder)


def test_a_tokenizer_that_cannot_be_used_is_refused_at_once(folder):
    settings = read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": "long"}))
    assert "the tokenizer cannot be read" in refusal(load_tokenizer, folder)
