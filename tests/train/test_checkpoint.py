import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxpost.errors import CheckpointError, ConfigError, NonFiniteError
from jaxpost.models.config import Compute
from jaxpost.models.hf import place
from jaxpost.sharding import make_mesh
from jaxpost.train.checkpoint import Checkpoints
from jaxpost.train.checkpoint_config import CheckpointConfig
from jaxpost.train.checksum import checksums
from jaxpost.train.state import create_state
from tests.conftest import make_model


def make_state(mesh_spec="fsdp=8", scale=1.0, **changes):
    mesh = make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        _, state = create_state(place(make_model(**changes), Compute(), mesh), optax.adamw(1e-3), nnx.Param, mesh)
    return jax.tree.map(lambda x: x if x.ndim == 0 else x * scale, state)


def saved(folder, *steps, **config):
    checkpoints = Checkpoints(folder, CheckpointConfig(**config))
    for step in steps:
        checkpoints.save(make_state(scale=step), step, {"num_tokens": step}, {})
    checkpoints.finish()
    checkpoints.__exit__()


def restore(folder, state, identity=None, **config):
    """(state, facts), or None, and what the user was told."""
    told = []
    checkpoints = Checkpoints(folder, CheckpointConfig(**config), identity, told.append)
    try:
        restored = checkpoints.restore(state)
        return restored and (restored.state, restored.facts, told)
    finally:
        checkpoints.__exit__()


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,tensor=4", "data=8"])
def test_what_is_restored_is_what_was_saved_on_any_mesh(tmp_path, mesh):
    saved(tmp_path / "checkpoints", 2, 4)
    state, facts, _ = restore(tmp_path / "checkpoints", make_state(mesh), resume_from_checkpoint="true")
    assert facts == {"num_tokens": 4}
    for a, b in zip(jax.tree.leaves(make_state(scale=4)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    _, facts, _ = restore(tmp_path / "checkpoints", make_state(mesh), resume_from_checkpoint="2")
    assert facts == {"num_tokens": 2}


def test_old_ones_go(tmp_path):
    saved(tmp_path / "checkpoints", 1, 2, 3, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_the_best_one_stays(tmp_path):
    config = CheckpointConfig(save_total_limit=1, load_best_model_at_end=True)
    checkpoints = Checkpoints(tmp_path / "run", config)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 4.0)):
        checkpoints.save(make_state(scale=step), step, {}, {"eval_loss": loss})
    checkpoints.finish()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["2", "3"]
    state, metrics = checkpoints.best(make_state())
    assert metrics == {"eval_loss": 1.0}
    np.testing.assert_array_equal(*(jax.tree.leaves(x)[-1] for x in (state, make_state(scale=2))))
    checkpoints.__exit__()


def test_the_same_run_is_continued_unasked_and_another_one_is_not(tmp_path):
    assert restore(tmp_path / "checkpoints", make_state()) is None
    assert not (tmp_path / "checkpoints").exists()
    saved(tmp_path / "checkpoints", 3)
    assert restore(tmp_path / "checkpoints", make_state())[1] == {"num_tokens": 3}
    with pytest.raises(ConfigError, match="holds a run at step 3"):
        restore(tmp_path / "checkpoints", make_state(), resume_from_checkpoint="false")
    now = {"seed": 1, "rows": "digest:12"}
    with pytest.raises(ConfigError, match=r"holds another run \(at step 3\): rows differ; seed was None, is 1"):
        restore(tmp_path / "checkpoints", make_state(), now)
    _, _, told = restore(tmp_path / "checkpoints", make_state(), now, resume_with_changes=True)
    assert told == ["the run goes on from step 3 with changes: rows differ; seed was None, is 1"]


def test_a_step_by_its_number_sets_later_ones_aside(tmp_path):
    saved(tmp_path / "run", 1, 2, 3)
    assert restore(tmp_path / "run", make_state(), resume_from_checkpoint="1")[1] == {"num_tokens": 1}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2.superseded", "3.superseded"]


@pytest.mark.parametrize("asked", ["5", "last", "-1"])
def test_a_step_that_is_not_there_is_named(tmp_path, asked):
    saved(tmp_path / "checkpoints", 3)
    with pytest.raises(ConfigError, match=rf"{asked}: it takes true, latest or one of the steps \[3\]"):
        restore(tmp_path / "checkpoints", make_state(), resume_from_checkpoint=asked)


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        restore(tmp_path / "checkpoints", make_state(), resume_from_checkpoint="true")
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    saved(tmp_path / "checkpoints", 3)
    with pytest.raises(CheckpointError, match=r"embedding is float32\[320, 32\], expected float32\[320, 48\]") as error:
        restore(tmp_path / "checkpoints", make_state(hidden_size=48), resume_from_checkpoint="true")
    assert error.value.exit_code == 78
    with pytest.raises(CheckpointError, match=r"expected bfloat16\[320, 32\]"):
        half = jax.tree.map(lambda x: x.astype("bfloat16") if x.ndim else x, make_state())
        restore(tmp_path / "checkpoints", half, resume_from_checkpoint="true")


def damage(folder, how):
    """The largest data file of a step, with a flipped bit, cut, or deleted."""
    file = max((path for path in (folder / "d").iterdir()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    match how:
        case "flipped":
            file.write_bytes(data)
        case "cut":
            file.write_bytes(data[:100])
        case "deleted":
            file.unlink()
        case "manifest":
            text = (folder / "manifest.json").read_text()
            (folder / "manifest.json").write_text(text.replace("num_tokens", "num_tokenz"))


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(tmp_path, how):
    saved(tmp_path / "run", 1, 2)
    damage(tmp_path / "run" / "2", how)
    with pytest.raises(CheckpointError, match="damaged") as error:
        restore(tmp_path / "run", make_state(), resume_from_checkpoint="2")
    assert error.value.exit_code == 78
    state, facts, told = restore(tmp_path / "run", make_state())
    assert facts == {"num_tokens": 1} and "set aside as 2.corrupt" in told[0]
    for a, b in zip(jax.tree.leaves(make_state(scale=1)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    saved(tmp_path / "run", 1)
    damage(tmp_path / "run" / "1", "cut")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(1.corrupt\)"):
            restore(tmp_path / "run", make_state())


def test_a_step_without_its_manifest_does_not_count(tmp_path):
    saved(tmp_path / "run", 1, 2)
    (tmp_path / "run" / "2" / "manifest.json").unlink()
    (tmp_path / "run" / "3.orbax-checkpoint-tmp-7").mkdir()
    _, facts, told = restore(tmp_path / "run", make_state())
    assert facts == {"num_tokens": 1} and "was not finished" in told[0]
    saved(tmp_path / "run", 2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig())
    with pytest.raises(NonFiniteError, match=r"state of step 4 holds NaN or infinity \(opt_state"):
        checkpoints.save(make_state(scale=float("inf")), 4, {}, {})
    checkpoints.__exit__()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig())
    for act in (lambda: checkpoints.save(make_state(), 4, {}, {}), lambda: checkpoints.restore(make_state())):
        with pytest.raises(CheckpointError, match=r"takes 0.000\d+ GB, .* has 0.0001 GB free") as error:
            act()
        assert error.value.exit_code == 78
    checkpoints.__exit__()


def test_a_save_that_fails_is_tried_again_but_not_for_ever(tmp_path, monkeypatch):
    told = []
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), tell=told.append)
    real, times = checkpoints._orbax.save, []

    def failing(*args, **kwargs):
        times.append(None)
        if len(times) <= 2:
            raise OSError("the storage is away")
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoints._orbax, "save", failing)
    for step in (1, 2, 3):
        checkpoints.save(make_state(scale=step), step, {"num_tokens": step}, {})
        assert checkpoints.is_due == (step < 3)
    checkpoints.finish()
    assert len(told) == 2 and "the storage is away" in told[0]
    times.clear()
    with pytest.raises(CheckpointError, match="3 checkpoints in a row could not be saved: the storage is away"):
        for step in (4, 5, 6):
            monkeypatch.setattr(checkpoints._orbax, "save", lambda *_, **__: failing() or times.clear())
            times.clear()
            checkpoints.save(make_state(scale=step), step, {}, {})
    checkpoints.__exit__()
    assert restore(tmp_path / "run", make_state())[1] == {"num_tokens": 3}


def test_what_cannot_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch):
    saved(tmp_path / "run", 3)
    monkeypatch.setattr("jaxpost.train.checkpoint.FIRST_WAIT", 0.01)
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(), tell=lambda text: None)
    real, faults = checkpoints._orbax.restore, [OSError("busy"), OSError("busy")]

    def reading(*args, **kwargs):
        if faults:
            raise faults.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints._orbax, "restore", reading)
    assert checkpoints.restore(make_state()).facts == {"num_tokens": 3}
    checkpoints.__exit__()


def test_a_step_saved_twice_has_the_metrics_of_the_second_time(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig())
    checkpoints.save(make_state(), 3, {"owes_evaluation": True}, {})
    checkpoints.save(make_state(), 3, {"owes_evaluation": False}, {"eval_loss": 2.0})
    checkpoints.finish()
    assert checkpoints.best(make_state())[1] == {"eval_loss": 2.0}
    checkpoints.__exit__()
    assert restore(tmp_path / "run", make_state())[1] == {"owes_evaluation": False}


def test_checksums_do_not_depend_on_the_layout_and_see_every_bit():
    states = [make_state(mesh) for mesh in ("fsdp=8", "fsdp=2,tensor=4", "data=8")]
    sums = [[int(x) for x in checksums(state.params)[0]] for state in states]
    assert sums[0] == sums[1] == sums[2]
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16", "int8", "int32"):
        x = np.asarray(jax.numpy.asarray(rng.normal(size=(5, 7)) * 50, dtype))
        seen = {int(checksums([x])[0][0])}
        for bit in range(8 * x.nbytes):
            other = x.copy()
            other.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
            seen.add(int(checksums([other])[0][0]))
        swapped = x.copy()
        swapped[0, [0, 1]] = swapped[0, [1, 0]]
        seen.add(int(checksums([swapped])[0][0]))
        assert len(seen) == 8 * x.nbytes + 2


def test_a_bucket_without_its_package_or_that_is_not_there_is_named():
    with pytest.raises(
        ConfigError, match=r"checkpoint_dir gs://nowhere/x (needs a package: pip install|cannot be reached)"
    ):
        Checkpoints("gs://nowhere/x", CheckpointConfig())
