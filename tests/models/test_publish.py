"""A model folder is the old one, the new one, or visibly none: whatever happens, and whatever else is in it."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from jaxpost.errors import CheckpointError
from jaxpost.models.publish import replacing

INDEX = "model.safetensors.index.json"
SINGLE = {"config.json": "{}", "model.safetensors": "w", "tokenizer_config.json": "{}"}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SHARDED = {
    **dict.fromkeys(["config.json", "tokenizer_config.json", *SHARDS], "w"),
    INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}),
}
FOREIGN = {"notes.txt": "mine", "other.safetensors": "mine", "generation_config.json": "mine"}


class Killed(BaseException):
    """Stands for the end of the process."""


def write(folder, files, version=""):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text if name == INDEX else text + version)


def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def versions(files, version):
    return {name: text if name == INDEX else text + version for name, text in files.items()}


def publish(target, files, version=""):
    with replacing(target) as folder:
        write(folder, files, version)


@pytest.fixture
def target(tmp_path):
    """Where to; nothing may stay behind beside it."""
    yield tmp_path / "a" / "out"
    assert [path.name for path in (tmp_path / "a").iterdir()] in ([], ["out"])


@pytest.mark.parametrize("empty", [True, False])
def test_a_new_folder_appears_as_a_whole(target, empty):
    if empty:
        target.mkdir(parents=True)
    with replacing(target) as folder:
        write(folder, SINGLE)
        assert not target.exists() or not any(target.iterdir())
    assert read(target) == SINGLE


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, SINGLE])
def test_a_failure_while_writing_leaves_what_was_there(target, error, old):
    if old:
        publish(target, old)
    with pytest.raises(error), replacing(target) as folder:
        write(folder, SHARDED)
        raise error
    assert read(target) == old if old else not target.exists()


def test_an_error_of_the_disk_is_one_line_with_exit_code_78(target):
    with pytest.raises(CheckpointError) as caught, replacing(target) as folder:
        write(folder, SINGLE)
        raise OSError(28, "No space left on device")
    assert caught.value.exit_code == 78 and not target.exists()
    assert str(caught.value).startswith(f"{target}: the model cannot be written ([Errno 28] No space left on device);")


@pytest.mark.parametrize("old", [SINGLE, SHARDED])
@pytest.mark.parametrize("new", [SINGLE, SHARDED])
def test_other_files_stay_and_old_weights_go(target, old, new):
    publish(target, old, "old")
    write(target, FOREIGN)
    publish(target, new, "new")
    assert read(target) == versions(new, "new") | FOREIGN


@pytest.mark.parametrize("old", [SINGLE, SHARDED])
@pytest.mark.parametrize("new", [SINGLE, SHARDED])
def test_a_process_that_ends_while_files_are_exchanged_never_leaves_a_mixture(target, old, new, monkeypatch):
    wholes, seen, killed = [versions(old, "old") | FOREIGN, versions(new, "new") | FOREIGN], [], True
    while killed:
        publish(target, old, "old")
        write(target, FOREIGN)
        killed = exchange_with_few_steps(target, new, len(seen), monkeypatch)
        found = read(target)
        assert found in wholes or "config.json" not in found
        assert found.items() >= FOREIGN.items()
        seen.append(wholes.index(found) if found in wholes else "broken")
        publish(target, new, "new")  # the next export mends it
        assert read(target) == wholes[1]
    assert seen[0] == 0 and seen[-1] == 1 and "broken" in seen


def exchange_with_few_steps(target, new, num_steps, monkeypatch):
    """Publish, but for a process that ends before it moves or removes one more file; whether it did end."""
    steps = iter(range(num_steps))

    def mortal(act):
        def step(*args, **options):
            if next(steps, None) is None:
                raise Killed
            return act(*args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        try:
            publish(target, new, "new")
        except Killed:
            return True
    return False


def test_an_index_names_no_files_to_remove_but_weights_of_its_folder(target):
    outside = target.parent.parent / "outside.safetensors"
    outside.write_text("mine")
    names = [f"../../{outside.name}", str(outside), "notes.txt", "sub/x.safetensors", 3, None]
    write(target.parent, {})
    write(target, {"notes.txt": "mine", INDEX: json.dumps({"weight_map": dict(enumerate(names))})})
    (target / "sub").mkdir()
    write(target / "sub", {"x.safetensors": "mine"})
    publish(target, SINGLE)
    assert outside.exists() and (target / "sub" / "x.safetensors").exists()
    assert read(target) == {**SINGLE, "notes.txt": "mine"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none_is_no_hindrance(target, text):
    target.mkdir(parents=True)
    write(target, {INDEX: text})
    publish(target, SINGLE)
    assert read(target) == SINGLE


def test_a_chat_template_goes_with_its_tokenizer(target):
    publish(target, {**SINGLE, "chat_template.jinja": "old"})
    publish(target, {"config.json": "{}", "model.safetensors": "new"})
    assert read(target)["chat_template.jinja"] == "old"
    publish(target, SINGLE)
    assert read(target) == SINGLE


def test_folders_are_exchanged_too(target):
    for version in ("old", "new"):
        with replacing(target) as folder:
            write(folder, SINGLE)
            write(folder / "additional_chat_templates", {f"{version}.jinja": "x"})
    assert [path.name for path in (target / "additional_chat_templates").iterdir()] == ["new.jinja"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(target):
    dead, alive = (target.parent / f".out.saving-{name}" for name in ("dead", "alive"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        write(folder, SINGLE)
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    publish(target, SINGLE)
    assert not dead.exists() and read(alive) == SINGLE
    os.close(handle)
    publish(target, SINGLE)
    assert not alive.exists()


def test_two_at_once_do_not_touch_each_other(target):
    with replacing(target) as first:
        write(first, SHARDED, "first")
        with replacing(target) as second:
            write(second, SINGLE, "second")
        assert read(target) == versions(SINGLE, "second")
        assert read(first) == versions(SHARDED, "first")
    assert read(target) == versions(SHARDED, "first")


def test_a_mount_point_is_filled_from_within(target, monkeypatch):
    publish(target, SINGLE, "old")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    with replacing(target) as folder:
        assert folder.parent == target
        write(folder, SHARDED)
    assert read(target) == SHARDED


def test_the_working_directory_is_filled_and_not_replaced(target, monkeypatch):
    target.mkdir(parents=True)
    monkeypatch.chdir(target)
    publish(target, SINGLE)
    assert sorted(os.listdir()) == sorted(SINGLE)
