"""What a reference says of every example, asked once before the first step and kept on disk."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpost.data.examples import Example
from jaxpost.data.fingerprint import digest
from jaxpost.data.loader import Loader
from jaxpost.data.store import stored
from jaxpost.objectives.base import Batch, Objective
from jaxpost.sharding import path_of, put
from jaxpost.train.evaluate import by_example

MIXERS = np.uint32(2654435761), np.uint32(2246822519)  # odd, with bits all over


def reference_logps(
    objective: Objective, reference: Any, loader: Loader, mesh: jax.sharding.Mesh, folder: str
) -> np.ndarray:
    """Column `ref_logps` of every example, as `objective.annotate` would ask for it; float32 [N].

    Args:
        objective: the method.
        reference: the model.
        loader: has each example once.
        mesh: where batches go.
        folder: of the cache, keyed by the program, the weights and the examples; empty for none. Several processes keep
            none: they would have to agree on what is there.
    """
    graphdef, weights = nnx.split(reference)

    def ask(weights: Any, batch: Batch) -> Array:
        model = nnx.merge(graphdef, weights)
        remembered = {name: jnp.zeros(len(batch["tokens"])) for name in objective.remembers}
        return objective.annotate(model, model, batch | remembered)["ref_logps"]

    compiled = jax.jit(ask)
    program = compiled.lower(weights, put(loader.empty(loader.lengths[-1]), mesh)).as_text()
    key = digest(program, jax.__version__, weights_digest(weights), loader.packs.digest())

    def answers() -> Iterator[Example]:
        nothing = np.array([], np.int32), np.array([], bool)
        values = by_example(functools.partial(compiled, weights), loader, mesh)
        return (Example(*nothing, float(value)) for value in values)

    return stored(_later(answers), folder=folder if jax.process_count() == 1 else "", key=key).values


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


def _later(make: Callable[[], Iterator[Example]]) -> Iterator[Example]:
    """What `make` makes, once somebody asks for the first of it."""
    yield from make()
