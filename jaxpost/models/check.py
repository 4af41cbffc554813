"""What is checked of a model's weights: their names and shapes before they are read, and then their values."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpost.errors import ConfigError
from jaxpost.models.checkpoint import Checkpoint
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import rows_of
from jaxpost.models.memory import release
from jaxpost.models.rows import Row, hf_tensors
from jaxpost.sharding import path_of

SCORE, LM_HEAD, EMBEDDING = "score.weight", "lm_head.weight", "model.embed_tokens.weight"
COMPARED_ROWS = 1024

Shapes = dict[str, tuple[int, ...]]


def check_tensors(config: ModelConfig, head: str, checkpoint: Checkpoint, shapes: Shapes, source: str) -> None:
    """Compare what the architecture needs with what the files hold, before anything is loaded.

    Raises:
        ConfigError: lists missing, unexpected and wrongly shaped tensors; the files hold a model with another head.
    """
    rows, names = rows_of(config, head), checkpoint.names()
    most = max(math.prod(shapes[row.path][: row.stacked]) for row in rows)
    if most > len(names):  # before a name is made for each
        raise ConfigError(
            f"{source}: config.json asks for {most} tensors of one kind, the files hold {len(names)} in all"
        )
    needed = hf_tensors(rows, shapes)
    if head == "lm" and SCORE in names:
        raise ConfigError(
            f'{source} is a reward model (it has {SCORE}); give a language model, or load it with head="reward"'
        )
    is_classifier = "ForSequenceClassification" in str(config.hf.get("architectures"))
    may_lack = set() if is_classifier else {SCORE}
    ignored = {LM_HEAD} if config.tie_embeddings or head == "reward" else set()
    ignored |= {name for name in names if name.endswith("rotary_emb.inv_freq")}
    missing = sorted(set(needed) - names - may_lack)
    unexpected = sorted(names - set(needed) - ignored)
    wrong = [
        f"{name} {list(checkpoint.shape(name))} instead of {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in names and checkpoint.shape(name) != tensor.shape
    ]
    problems = [
        f"{kind}: {_few(names, 5)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ConfigError(f"{source}: the weights do not fit config.json; {'; '.join(problems)}")
    if config.tie_embeddings and head == "lm" and LM_HEAD in names:
        _check_tied(checkpoint, source)


def _check_tied(checkpoint: Checkpoint, source: str) -> None:
    """Raise ConfigError if a head that would not be loaded says something else than the embedding."""
    embedding, head = checkpoint.read(EMBEDDING), checkpoint.read(LM_HEAD)
    same = embedding.shape == head.shape and all(
        np.array_equal(embedding[rows], head[rows], equal_nan=True)
        for rows in (slice(start, start + COMPARED_ROWS) for start in range(0, len(head), COMPARED_ROWS))
    )
    release(embedding)
    release(head)
    if not same:
        raise ConfigError(
            f"{source}: config.json ties the head to the embedding, but {LM_HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false, or remove the tensor that is wrong"
        )


def check_finite(weights: Any, known: dict[str, np.ndarray], rows: dict[str, Row], mesh: Mesh, source: str) -> None:
    """Raise ConfigError if a weight is NaN or infinite; of some parameters, `known` tells for each HF tensor."""
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    leaves = {path: leaf for path, leaf in leaves.items() if path in rows}
    kinds = tuple((rows[path].stacked, leaf.sharding.spec) for path, leaf in leaves.items())
    finite = dict(zip(leaves, jax.device_get(finite_tensors(tuple(leaves.values()), kinds, mesh)), strict=True)) | known
    bad = sorted({rows[path].hf_name.format(*at) for path, flags in finite.items() for at in np.argwhere(flags == 0)})
    if bad:
        raise ConfigError(
            f"{source}: NaN or infinity (in {jax.tree.leaves(weights)[0].dtype}) in {_few(bad, 3)}; the files are "
            "damaged or their training had diverged: take another checkpoint, or --allow_nonfinite_weights true"
        )


@partial(jax.jit, static_argnums=(1, 2))
def finite_tensors(parameters: tuple[Array, ...], kinds: tuple[tuple[int, P], ...], mesh: Mesh) -> tuple[Array, ...]:
    """1 for each HF tensor that is finite, else 0; `kinds` are the parameters' stacked axes and layouts.

    Each device judges its own shards, number by number: a maximum may leave out NaN, over devices, and on a CPU over an
    array of thousands.
    """

    def judge(*shards: Array) -> tuple[Array, ...]:
        found = []
        for shard, (num_stacked, spec) in zip(shards, kinds, strict=True):
            finite = jnp.all(jnp.isfinite(shard), tuple(range(num_stacked, shard.ndim))).astype(jnp.int32)
            for dim, split in enumerate(spec[:num_stacked]):  # experts
                finite = jax.lax.all_gather(finite, split or (), axis=dim, tiled=True)
            found.append(jax.lax.pmin(finite, mesh.axis_names))
        return tuple(found)

    specs = tuple(spec for _, spec in kinds)
    return jax.shard_map(judge, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*parameters)


def _few(names: list[str], count: int) -> str:
    """The first names, and how many there are beyond."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
