import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.hf import place
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.dpo import DPO
from jaxpost.objectives.sft import SFT
from jaxpost.sharding import make_mesh, put
from jaxpost.train.state import create_state, decay_mask
from jaxpost.train.step import make_step
from tests.conftest import TINY_LLAMA, make_batch, make_model

ONE_DEVICE = "one"


def run(mesh_spec=ONE_DEVICE, micro=1, steps=2, batch=None, optimizer=None, max_grad_norm=1.0):
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh_spec == ONE_DEVICE else make_mesh(mesh_spec)
    schedule = optax.constant_schedule(1e-2)
    optimizer = optimizer or optax.adamw(schedule)
    model = place(make_model(), Compute(), mesh)
    with jax.set_mesh(mesh):
        graphdef, state = create_state(model, optimizer, nnx.Param, mesh)
        step = make_step(
            SFT(), graphdef, state, optimizer, schedule, max_grad_norm=max_grad_norm, num_micro_batches=micro
        )
        reports = []
        for _ in range(steps):
            state, report = step(state, put(batch or make_batch(rows=8), mesh))
            reports.append(jax.device_get(report))
    return state, reports, step


def losses(reports):
    return [float(report.metrics["loss"].total / report.metrics["loss"].count) for report in reports]


def test_accumulated_gradient_equals_the_whole_batch():
    keeper = optax.trace(decay=0.0)  # its state is the last gradient
    whole, _, _ = run(micro=1, steps=1, optimizer=keeper, max_grad_norm=None)
    parts, _, _ = run(micro=8, steps=1, optimizer=keeper, max_grad_norm=None)
    for a, b in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(parts.opt_state), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)


@pytest.mark.parametrize(("mesh", "micro"), [("fsdp=8", 1), ("fsdp=4,tensor=2", 2), ("data=2,fsdp=2,tensor=2", 1)])
def test_eight_devices_equal_one(mesh, micro):
    _, one, _ = run(steps=3)
    _, eight, _ = run(mesh, micro, steps=3)
    np.testing.assert_allclose(losses(eight), losses(one), atol=1e-5)
    np.testing.assert_allclose(eight[-1].latest["grad_norm"], one[-1].latest["grad_norm"], rtol=1e-4)


def test_parameters_and_moments_are_split_over_fsdp():
    state, _, _ = run("fsdp=8", steps=1)
    for tree in (state.params, state.opt_state):
        big = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1 and leaf.shape[-1] > 32]
        assert big
        assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in big)


def test_one_compilation_and_everything_donated():
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = optax.adamw(1e-3)
    with jax.set_mesh(mesh):
        graphdef, state = create_state(place(make_model(), Compute(), mesh), optimizer, nnx.Param, mesh)
        step = make_step(SFT(), graphdef, state, optimizer, lambda _: 1e-3, max_grad_norm=1.0, num_micro_batches=2)
        old = state
        for seed in range(3):
            state, _ = step(state, put(make_batch(seed=seed), mesh))
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))


def test_report_counts_tokens_and_gives_the_norm_before_clipping():
    batch = make_batch(rows=8)
    _, free, _ = run(steps=1, max_grad_norm=None)
    _, clipped, _ = run(steps=1, max_grad_norm=1e-3)
    assert int(free[0].num_tokens) == batch["segments"].sum()
    assert free[0].metrics["loss"].count == batch["loss_mask"][:, 1:].sum()
    np.testing.assert_allclose(free[0].latest["grad_norm"], clipped[0].latest["grad_norm"], rtol=1e-6)
    assert free[0].latest["learning_rate"] == np.float32(1e-2)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was():
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = optax.adamw(1e-2)
    batch = make_batch()
    poisoned = {**batch, "tokens": np.where(batch["segments"] > 0, 10_000, 0).astype(np.int32)}  # no such row: NaN
    with jax.set_mesh(mesh):
        graphdef, state = create_state(place(make_model(), Compute(), mesh), optimizer, nnx.Param, mesh)
        before = jax.device_get((state.params, state.opt_state))
        step = make_step(SFT(), graphdef, state, optimizer, lambda _: 1e-2, max_grad_norm=1.0, num_micro_batches=1)
        state, report = step(state, put(poisoned, mesh))
    assert not report.finite
    assert int(state.step) == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_decay_is_for_matrices_only():
    mask = decay_mask(nnx.to_pure_dict(nnx.state(make_model(attention_bias=True))))
    assert mask["layers"]["attention"]["query"] == {"kernel": True, "bias": False}
    assert mask["layers"]["attention_norm"]["scale"] is False
    assert mask["embed"]["embedding"] is True


def make_pairs(rows, length, vocab):
    """Rows of a chosen and a rejected example, annotated."""
    batch = make_batch(rows, length, vocab)
    second = batch["positions"] >= length // 2
    ones = np.ones((rows, 2), np.float32)
    segments = np.where(batch["segments"] > 0, 1 + second, 0).astype(np.int32)
    positions = batch["positions"] - second * (length // 2)
    return {**batch, "segments": segments, "positions": positions, "examples": ones, "ref_logps": -ones}


@pytest.mark.parametrize(
    ("objective", "make", "vocab"),
    [(SFT(), make_batch, 131_072), (DPO(), make_pairs, 151_936), (DPO(use_weighting=True), make_pairs, 151_936)],
    ids=["sft", "dpo", "wpo"],
)
def test_logits_are_never_materialised(objective, make, vocab):
    """Temporaries of the compiled step, the head's gradient aside, stay under a tenth of [B, T, V] logits.

    Of preferences these are 4 pairs of 1,024 tokens.
    """
    rows, length = 4, 2048
    config = read_config({**TINY_LLAMA, "vocab_size": vocab, "tie_word_embeddings": False}, "wide")
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = optax.adamw(1e-3)
    model = Decoder(config, compute=Compute(remat="full"), rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        graphdef, state = create_state(place(model, model.compute, mesh), optimizer, nnx.Param, mesh)
        step = make_step(objective, graphdef, state, optimizer, lambda _: 1e-3, max_grad_norm=1.0, num_micro_batches=1)
        batch = put(make(rows, length, vocab), mesh)
        memory = step.lower(state, batch).compile().memory_analysis()
    head_gradient = vocab * config.embed_dim * 4
    temporaries, logits = memory.temp_size_in_bytes - head_gradient, rows * length * vocab * 4
    print(f"temporaries {temporaries / 1e6:.0f} MB, logits {logits / 1e6:.0f} MB")
    assert temporaries < logits / 10
