"""Ten steps of each objective on a tiny model whose weights come from numpy: what the stored numbers are made of."""

from functools import partial

import jax
import numpy as np
import optax
from flax import nnx

from jaxpost.models.actor_critic import beside, trainable_of
from jaxpost.models.config import Compute
from jaxpost.models.hf import place
from jaxpost.objectives.bco import BCO
from jaxpost.objectives.cpo import CPO
from jaxpost.objectives.dpo import DPO
from jaxpost.objectives.grpo import GRPO
from jaxpost.objectives.kto import KTO
from jaxpost.objectives.online import OnlineBase
from jaxpost.objectives.orpo import ORPO
from jaxpost.objectives.ppo import PPO
from jaxpost.objectives.reward import Reward
from jaxpost.objectives.rloo import RLOO
from jaxpost.objectives.sft import SFT
from jaxpost.sharding import make_mesh, put
from jaxpost.train.reference import Reference
from jaxpost.train.state import create_state, merge
from jaxpost.train.step import make_annotate, make_step, remembered
from tests.conftest import make_batch, make_model

OBJECTIVES = {
    "sft": SFT(),
    "sft_dft": SFT(loss_type="dft"),
    "dpo": DPO(loss_type=["sigmoid", "aot_unpaired", "sft"], loss_weights=[1.0, 0.5, 0.1]),
    "orpo": ORPO(),
    "cpo": CPO(),
    "simpo": CPO(loss_type="simpo", cpo_alpha=0.0),
    "kto": KTO(),
    "bco": BCO(),
    "grpo": GRPO(beta=0.1, use_adaptive_entropy=True, entropy_target=6.0, top_entropy_quantile=0.8),
    "gspo": GRPO(loss_type="grpo", importance_sampling_level="sequence", scale_rewards="batch"),
    "rloo": RLOO(),
    "ppo": PPO(adap_kl_ctrl=True, horizon=100.0, whiten_rewards=True, max_kl=0.05, entropy_coef=0.01),
    "reward": Reward(center_rewards_coefficient=0.1),
}


def filled(seed, head="lm"):
    """A model whose weights come from numpy."""
    model, rng = make_model(head=head), np.random.default_rng(seed)
    weights = nnx.to_pure_dict(nnx.state(model))
    nnx.update(
        model,
        jax.tree.map(lambda leaf: rng.normal(float(leaf.ndim == 1), 0.1, leaf.shape).astype(np.float32), weights),
    )
    return model


def model_for(name, mesh):
    """What is trained: with a value model where the objective needs one."""
    model = place(filled(0, "reward" if name == "reward" else "lm"), Compute(), mesh)
    return beside(model, place(filled(2, "reward"), Compute(), mesh)) if name == "ppo" else model


def make_examples(seed):
    """Rows of `make_batch` with two examples each."""
    batch = make_batch(seed=seed)
    half = np.sum(batch["segments"], axis=1, keepdims=True) // 2
    second = batch["positions"] >= half
    ones = np.ones((len(second), 2), np.float32)
    return {
        **batch,
        "positions": np.where(second, batch["positions"] - half, batch["positions"]),
        "segments": batch["segments"] * (1 + second),
        "examples": ones,
        "margin": ones / 4,
        "label": ones * [1, 0],
    }


def batch_for(name, seed):
    if name.startswith("sft"):
        return make_batch(seed=seed)
    others = {f"mismatched_{key}": column for key, column in make_examples(seed + 100).items()}
    return make_examples(seed) | (others if name == "kto" else {})


def sampled(batch, seed):
    """What a source of completions tells beside."""
    rng, shape = np.random.default_rng(seed), batch["examples"].shape
    return {
        **batch,
        "groups": np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape) // 4,
        "rewards": rng.normal(size=(*shape, 2)).astype(np.float32),
        "ended": np.ones(shape, np.float32),
        "num_trained": np.stack(
            [
                np.sum(batch["loss_mask"] * (batch["positions"] > 0) * (batch["segments"] == i + 1), axis=1)
                for i in range(shape[1])
            ],
            axis=1,
        ),
    }


def trace(name: str) -> dict[str, list[float]]:
    """Loss and gradient norm of each step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    schedule = optax.constant_schedule(3e-3)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    losses, norms = [], []
    with jax.set_mesh(mesh):
        model = model_for(name, mesh)
        graphdef, state = create_state(model, optimizer, trainable_of(model), mesh, OBJECTIVES[name].remembers)
        other, arrays = nnx.split(place(filled(1), Compute(), mesh))
        reference = Reference(lambda _, own: nnx.merge(other, own), arrays)
        annotate = make_annotate(OBJECTIVES[name], graphdef, reference, num_parts=2)
        step = make_step(OBJECTIVES[name], graphdef, state, optimizer, schedule, max_grad_norm=1.0, num_micro_batches=2)
        for seed in range(10):
            batch = batch_for(name, seed)
            if isinstance(OBJECTIVES[name], OnlineBase):
                appraise = partial(OBJECTIVES[name].appraise, reused=True)
                models = merge(graphdef, state.params, state.frozen), reference.build(None, arrays)
                rows = remembered(put(sampled(batch, seed), mesh), state.memory)
                batch = jax.tree.map(np.asarray, appraise(*models, rows))
            state, report = step(state, annotate(state, put(batch, mesh)))
            losses.append(float(report.metrics["loss"].value()))
            norms.append(float(report.latest["grad_norm"]))
    return {"loss": losses, "grad_norm": norms}
