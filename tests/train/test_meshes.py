"""A mesh changes nothing: each method on eight devices against one, and an eighth of the bytes on each of them."""

import itertools
from collections import Counter
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from jaxpost.models.actor_critic import beside, trainable_of
from jaxpost.models.adapters import attach
from jaxpost.models.config import Compute
from jaxpost.models.hf import place
from jaxpost.models.lora_config import LoraConfig
from jaxpost.objectives.dpo import DPO
from jaxpost.objectives.grpo import GRPO
from jaxpost.objectives.online import OnlineBase
from jaxpost.objectives.ppo import PPO
from jaxpost.objectives.sft import SFT
from jaxpost.sharding import make_mesh, path_of, put
from jaxpost.train.state import create_state
from jaxpost.train.step import make_step, remembered
from tests.conftest import make_batch, make_noisy_model
from tests.golden.trace import make_examples, sampled
from tests.marks import slow

OBJECTIVES = {
    "sft": SFT(),
    "lora": SFT(),
    "dpo": DPO(),
    "grpo": GRPO(beta=0.1),
    "ppo": PPO(whiten_rewards=True),
    "moe": SFT(router_aux_loss_coef=0.1),
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CHANGES = {"moe": {"model_type": "qwen3_moe", "mlp_bias": None, **EXPERTS}}  # of the config.json of a model
MESHES = [
    "data=8",
    "fsdp=8",
    "fsdp=4,tensor=2",
    "fsdp=2,tensor=4",  # twice as many as heads of keys
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,expert=4",
    "fsdp=2,expert=2,tensor=2",
    "fsdp=2,context=4",
    "context=2,tensor=2,expert=2",
]
USUAL = [
    *[("sft", "data=8"), ("sft", "fsdp=2,tensor=4"), ("sft", "fsdp=2,context=4")],
    *[("lora", "fsdp=4,tensor=2"), ("lora", "data=2,fsdp=2,tensor=2")],
    *[("dpo", "fsdp=8"), ("dpo", "data=2,fsdp=2,tensor=2")],
    *[("grpo", "data=8"), ("grpo", "fsdp=4,tensor=2"), ("grpo", "context=2,tensor=2,expert=2")],
    *[("ppo", "fsdp=8"), ("ppo", "fsdp=2,tensor=4")],
    *[("moe", "fsdp=2,expert=4"), ("moe", "fsdp=2,expert=2,tensor=2")],
]
NUM_STEPS = 3
# Compiling is most of the time; what is split, and the order of sums, does not depend on it.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


class Outcome(NamedTuple):
    """Of a few steps: their losses, the first one's gradient by path, and the largest share of bytes on a device."""

    losses: list[float]
    gradient: dict[str, np.ndarray]
    share: float


def mesh_of(spec):
    return make_mesh(spec, None if spec else jax.devices()[:1])


def model_for(method, mesh):
    compute = Compute(remat="dots")
    model = place(make_noisy_model(0, **CHANGES.get(method, {})), compute, mesh)
    if method == "lora":
        return attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"))
    return beside(model, place(make_noisy_model(2, head="reward"), compute, mesh)) if method == "ppo" else model


@cache
def rows_of(method):
    """A batch that the method has annotated, on one device."""
    objective = OBJECTIVES[method]
    halves = [(make_batch if isinstance(objective, SFT) else make_examples)(seed=seed) for seed in (0, 1)]
    batch = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
    batch = sampled(batch, 0) if isinstance(objective, OnlineBase) else batch

    def annotate(policy, reference, batch):
        if isinstance(objective, OnlineBase):
            batch = objective.appraise(policy, reference, batch, reused=True)
        return objective.annotate(policy, reference, batch)

    batch = remembered(batch, dict.fromkeys(objective.remembers, 0.0))
    models = model_for(method, mesh_of(None)), make_noisy_model(1)
    return jax.tree.map(np.asarray, jax.jit(annotate, compiler_options=QUICK)(*models, batch))


@cache
def outcome(method, spec):
    objective, mesh = OBJECTIVES[method], mesh_of(spec)
    batch = put(rows_of(method), mesh)
    optimizer = optax.chain(optax.trace(decay=0.0), optax.adam(1e-3))  # the first one's state is the last gradient
    with jax.set_mesh(mesh):
        model = model_for(method, mesh)
        graphdef, state = create_state(model, optimizer, trainable_of(model), mesh, objective.remembers)
        share = share_of((state.params, state.frozen, state.opt_state))
        step = make_step(objective, graphdef, state, optimizer, lambda _: 1e-3, max_grad_norm=None, num_micro_batches=2)
        step = step.lower(state, batch).compile(compiler_options=QUICK)
        losses, gradient = [], {}
        for _ in range(NUM_STEPS):
            state, report = step(state, batch)
            losses.append(float(report.metrics["loss"].value()))
            leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.opt_state[0].trace))
            gradient = gradient or {path_of(path): leaf for path, leaf in leaves}
    return Outcome(losses, gradient, share)


def share_of(tree):
    """Bytes that the fullest device has of arrays, but for adapters, which are split along one of their sides."""
    leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "adapter" not in path_of(path)]
    held = Counter()
    for leaf in leaves:
        held.update({shard.device: shard.data.nbytes for shard in leaf.addressable_shards})
    return max(held.values()) / sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(
    ("method", "mesh"),
    [pair if pair in USUAL else slow(*pair) for pair in itertools.product(OBJECTIVES, MESHES)],
)
def test_eight_devices_equal_one(method, mesh):
    one, eight = outcome(method, None), outcome(method, mesh)
    apart = {path: distance(eight.gradient[path], leaf) for path, leaf in one.gradient.items()}
    loss, gradient = max(map(abs, np.subtract(one.losses, eight.losses))), max(apart.values())
    print(f"FIGURE {method} {mesh}: loss {loss:.1e}, gradient {gradient:.1e}, bytes {8 * eight.share:.3f} / 8")
    assert loss <= 1e-5
    assert gradient <= 1e-4, apart
    assert eight.share <= 1.1 / 8 * make_mesh(mesh).shape["data"]
    assert len(set(one.losses)) == NUM_STEPS


def distance(ours, expected):
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)
