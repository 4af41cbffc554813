import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models.config import Compute
from jaxpost.models.hf import place
from jaxpost.sharding import make_mesh
from jaxpost.train.checkpoint import CheckpointConfig, Checkpoints
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
    checkpoints.close()


def restore(folder, state, data="", **config):
    checkpoints = Checkpoints(folder, CheckpointConfig(**config), data)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,tensor=4", "data=8"])
def test_what_is_restored_is_what_was_saved_on_any_mesh(tmp_path, mesh):
    saved(tmp_path / "checkpoints", 2, 4)
    state, facts = restore(tmp_path / "checkpoints", make_state(mesh), resume_from_checkpoint="true")
    assert facts == {"num_tokens": 4}
    for a, b in zip(jax.tree.leaves(make_state(scale=4)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    _, facts = restore(tmp_path / "checkpoints", make_state(mesh), resume_from_checkpoint="2")
    assert facts == {"num_tokens": 2}


def test_old_ones_go(tmp_path):
    saved(tmp_path / "checkpoints", 1, 2, 3, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_an_earlier_run_is_neither_continued_nor_overwritten_unasked(tmp_path):
    assert restore(tmp_path / "checkpoints", make_state()) is None
    assert not (tmp_path / "checkpoints").exists()
    saved(tmp_path / "checkpoints", 3)
    for config in ({}, {"save_strategy": "no"}, {"resume_from_checkpoint": "false"}):
        with pytest.raises(ConfigError, match="holds a run at step 3"):
            restore(tmp_path / "checkpoints", make_state(), **config)


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


def test_a_checkpoint_of_other_batches_is_refused(tmp_path):
    saved(tmp_path / "run", 4)
    with pytest.raises(CheckpointError, match=r"run/4 was saved by a run over other batches"):
        restore(tmp_path / "run", make_state(), data="other", resume_from_checkpoint="true")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    saved(tmp_path / "checkpoints", 3)
    (tmp_path / "checkpoints" / "3" / "facts" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be restored"):
        restore(tmp_path / "checkpoints", make_state(), resume_from_checkpoint="true")
