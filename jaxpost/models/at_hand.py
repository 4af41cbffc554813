"""Weights as they are used at every token of a generation: layer by layer, in the dtype that they are multiplied in.

A mesh that splits every matrix over devices gathers it wherever it is used. For a whole batch that is little beside the
work; for one token of each completion it is nearly all of it, so it is done once for a generation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpost.sharding import constrain_parameter, path_of

MULTIPLIED = (".kernel", ".embedding")  # matrices that the model casts before it multiplies with them


def at_hand(weights: Any, dtype: str, *, gather: bool) -> Any:
    """The same arrays, ready to be multiplied with.

    Args:
        weights: a model's arrays or a part of them, a nested dict.
        dtype: that the model computes in.
        gather: lay each array out over `tensor` alone, and those of experts over `expert`.
    """

    def ready(path: Any, weight: Array) -> Array:
        name = path_of(path)
        if name.endswith(MULTIPLIED) and jnp.issubdtype(weight.dtype, jnp.floating):
            weight = weight.astype(dtype)
        return constrain_parameter(name, weight) if gather else weight

    return jax.tree_util.tree_map_with_path(ready, weights)
