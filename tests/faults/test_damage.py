"""Bits that flip on the disk, and files that are cut, emptied or gone."""

import random
import shutil

import jax
import numpy as np
import pytest

from jaxpost.cli import main
from jaxpost.train.checkpoint import Checkpoints
from jaxpost.train.checkpoint_config import CheckpointConfig
from tests.train.test_checkpoint import make_state, saved

pytestmark = pytest.mark.faults

WAYS = {
    "cut": lambda data, rng: data[: rng.randrange(len(data) or 1)],
    "zeroed": lambda data, rng: bytes(len(data)),
    "zeroed in part": lambda data, rng: data[:10] + bytes(min(4096, len(data) - 10)) + data[4106:],
    "emptied": lambda data, rng: b"",
    "deleted": lambda data, rng: None,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two checkpoints, and the states that are in them."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    saved(folder, 1, 2)
    return folder, {step: jax.device_get(jax.tree.leaves(make_state(scale=step))) for step in (1, 2)}


def files(folder):
    return sorted(path.relative_to(folder) for path in (folder / "2").rglob("*") if path.is_file())


def restored(sound, folder, name, data):
    """Which step comes back where a file of step 2 has this content; its state must be what was saved."""
    source, states = sound
    shutil.copytree(source, folder)
    (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    with Checkpoints(folder, CheckpointConfig(), tell=lambda text: None) as checkpoints:
        found = checkpoints.restore(make_state(scale=9))
    step = found.facts["num_tokens"]
    for ours, theirs in zip(jax.tree.leaves(found.state), states[step], strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)
    shutil.rmtree(folder)
    return step


def test_no_flipped_bit_is_restored_in_silence(sound, counts, tmp_path):
    steps = []
    for trial in range(counts(15, 100)):
        rng = random.Random(trial)
        sizes = [(sound[0] / name).stat().st_size for name in files(sound[0])]
        name = (
            rng.choices(files(sound[0]), [1 + size for size in sizes])[0] if trial % 2 else rng.choice(files(sound[0]))
        )
        data = bytearray((sound[0] / name).read_bytes())
        if not data:
            continue
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        steps.append(restored(sound, tmp_path / "run", name, bytes(data)))
    assert steps.count(1) > len(steps) / 2  # others were in what nothing depends on
    print(f"{len(steps)} flipped bits: {steps.count(1)} detected, {steps.count(2)} harmless")


def test_no_damaged_file_is_restored_in_silence(sound, counts, tmp_path):
    rng, steps = random.Random(0), []
    ways = list(WAYS)
    for number, name in enumerate(files(sound[0])):
        for way in counts([ways[number % len(ways)]], ways):
            data = WAYS[way]((sound[0] / name).read_bytes(), rng)
            if data != (sound[0] / name).read_bytes():
                steps.append(restored(sound, tmp_path / "run", name, data))
    assert steps.count(1) > len(steps) / 2
    print(f"{len(steps)} damaged files: {steps.count(1)} detected, {steps.count(2)} harmless")


def test_the_command_goes_on_from_the_one_before(rig, tmp_path, capsys):
    base = (
        f"sft --model_name_or_path {rig.model} --dataset_name {rig.home}/sft.jsonl --report_to none --max_steps 6 "
        f"--per_device_train_batch_size 1 --max_length 64 --save_steps 2 --output_dir {tmp_path}/out"
    )
    assert main(base.split()) == 0
    expected = (tmp_path / "out" / "model.safetensors").read_bytes()
    largest = max((tmp_path / "out" / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert main([*base.split(), "--resume_from_checkpoint", "6"]) == 78
    assert main(base.split()) == 0
    assert "set aside as 6.corrupt" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    for path in (tmp_path / "out" / "checkpoints").glob("*/manifest.json"):
        path.write_text("{")
    assert main(base.split()) == 78
    assert "no checkpoint is whole" in capsys.readouterr().err
