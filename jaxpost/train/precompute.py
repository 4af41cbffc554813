"""What a reference says of every example, asked once before the first step and kept on disk."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpost.data.examples import Example
from jaxpost.data.fingerprint import digest
from jaxpost.data.loader import Loader
from jaxpost.data.store import kept, stored
from jaxpost.objectives.base import Batch, Objective
from jaxpost.processes import all_agree
from jaxpost.sharding import path_of, put
from jaxpost.train.evaluate import by_example

MIXERS = np.uint32(2654435761), np.uint32(2246822519)  # odd, with bits all over


def precomputed(
    objective: Objective, column: str, reference: Any, loader: Loader, mesh: jax.sharding.Mesh, folder: str
) -> np.ndarray:
    """One of `objective.reference_columns` of every example, as `objective.annotate` asks for it; float32 [N].

    Args:
        objective: the method.
        column: its name.
        reference: the model.
        loader: has each example once.
        mesh: where batches go.
        folder: of the cache, keyed by the program, the weights and the examples; empty for none. What is not there for
            every process is asked by all of them.
    """
    graphdef, weights = nnx.split(reference)

    def ask(weights: Any, batch: Batch) -> Array:
        model = nnx.merge(graphdef, weights)
        remembered = {name: jnp.zeros(len(batch["tokens"])) for name in objective.remembers}
        return objective.annotate(model, model, batch | remembered)[column]

    compiled = jax.jit(ask)
    program = compiled.lower(weights, put(loader.empty(loader.lengths[-1]), mesh)).as_text()
    key = digest(column, program, jax.__version__, weights_digest(weights), loader.packs.digest())
    found = kept(folder, key)
    everywhere = all_agree(found is not None)
    if found is not None and everywhere:
        return found.values
    nothing = np.array([], np.int32), np.array([], bool)
    values = [float(value) for value in by_example(functools.partial(compiled, weights), loader, mesh)]
    return stored((Example(*nothing, value) for value in values), folder=folder, key=key).values


def weights_digest(weights: Any) -> str:
    """Of the bits of all arrays, by path, dtype and shape; the same on every mesh, and nothing leaves the devices."""

    @jax.jit
    def sums(array: Array) -> Array:
        flat = array.reshape(-1).view(f"uint{array.dtype.itemsize * 8}").astype(jnp.uint32)
        place = jax.lax.iota(jnp.uint32, flat.size)
        # Sums modulo 2^32 do not depend on how they are split; each number is mixed with its place first.
        mixed = [(flat ^ (place * factor)) * (place * factor | 1) for factor in MIXERS]
        return jnp.stack([jnp.sum(part ^ (part >> 15), dtype=jnp.uint32) for part in mixed])

    leaves = jax.tree_util.tree_leaves_with_path(weights)
    facts = ((path_of(path), str(leaf.dtype), leaf.shape, np.asarray(sums(leaf)).tolist()) for path, leaf in leaves)
    return digest(*facts)
