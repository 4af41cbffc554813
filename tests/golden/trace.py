"""Ten steps of each objective on a tiny model whose weights come from numpy: what the stored numbers are made of."""

import jax
import numpy as np
import optax
from flax import nnx

from jaxpost.models.config import Compute
from jaxpost.models.hf import place
from jaxpost.objectives.sft import SFT
from jaxpost.sharding import make_mesh, put
from jaxpost.train.state import create_state
from jaxpost.train.step import make_annotate, make_step
from tests.conftest import make_batch, make_model

OBJECTIVES = {"sft": SFT(), "sft_dft": SFT(loss_type="dft")}


def trace(name: str) -> dict[str, list[float]]:
    """Loss and gradient norm of each step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    model = make_model()
    rng = np.random.default_rng(0)
    weights = nnx.to_pure_dict(nnx.state(model))
    filled = jax.tree.map(lambda leaf: rng.normal(float(leaf.ndim == 1), 0.1, leaf.shape).astype(np.float32), weights)
    nnx.update(model, filled)
    schedule = optax.constant_schedule(3e-3)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    losses, norms = [], []
    with jax.set_mesh(mesh):
        graphdef, state = create_state(place(model, Compute(), mesh), optimizer, nnx.Param, mesh)
        annotate = make_annotate(OBJECTIVES[name], graphdef)
        step = make_step(OBJECTIVES[name], graphdef, state, optimizer, schedule, max_grad_norm=1.0, num_micro_batches=2)
        for seed in range(10):
            state, report = step(state, annotate(state, put(make_batch(seed=seed), mesh)))
            losses.append(float(report.means["loss"].value()))
            norms.append(float(report.latest["grad_norm"]))
    return {"loss": losses, "grad_norm": norms}
