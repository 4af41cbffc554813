"""Per-token log-probabilities and entropy without ever holding `[B, T, V]` logits.

Hidden states are scored in chunks along T. The scored positions of each row are moved to the front first, so chunks
that hold none (prompts, padding) cost nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxpost.metrics import Mean, masked_mean
from jaxpost.objectives.base import Batch, Model
from jaxpost.objectives.vocabulary import Scoring, TokenLoss, TokenScores, in_pieces, score_chunks, sum_losses
from jaxpost.platform import platform
from jaxpost.sharding import constrain, token_groups

CHUNK_BYTES = 64 * 2**20  # of float32 logits on a device
CHUNK_BYTES_CPU = 24 * 2**20  # whose products are as fast with few rows, so that a last chunk wastes less


def next_tokens(batch: Batch) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The target of each position and whether it is trained; nothing is predicted across documents."""
    targets, mask, segments = (jnp.roll(batch[name], -1, axis=1) for name in ("tokens", "loss_mask", "segments"))
    last = jnp.arange(targets.shape[1]) == targets.shape[1] - 1
    return targets, (mask > 0) & (segments == batch["segments"]) & ~last


def score_batch(model: Model, batch: Batch, **options: Any) -> tuple[TokenScores, Bool[Array, "B T"], Float[Array, ""]]:
    """Run the model over a batch and score its trained tokens; position t scores token t + 1.

    Args:
        model: a language model.
        batch: tokens, positions, segments, loss_mask.
        options: of `score_tokens`.

    Returns:
        (scores, mask of the trained tokens, load-balancing loss of the model's routers).
    """
    targets, mask = next_tokens(batch)
    h, balance = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    return score_tokens(model, h, targets, mask, **options), mask, balance


def sum_batch(
    model: Model, batch: Batch, token_loss: TokenLoss
) -> tuple[Mean, TokenScores, Bool[Array, "B T"], Float[Array, ""]]:
    """As `score_batch`, for a loss that is a sum over the trained tokens.

    Args:
        model: a language model.
        batch: tokens, positions, segments, loss_mask.
        token_loss: of log-probabilities, each from itself alone.

    Returns:
        (the losses, scores without a gradient, mask of the trained tokens, load-balancing loss of the routers).
    """
    targets, mask = next_tokens(batch)
    h, balance = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    scoring, inputs, in_place = _read(model, h, targets, mask)
    if scoring.pieces == 1:
        summed: Any = sum_losses(scoring, token_loss, *inputs)
        return summed[0], in_place(summed[1]), mask, balance
    scores = in_place(score_chunks(scoring, *inputs))
    return masked_mean(token_loss(scores.logps), mask), lax.stop_gradient(scores), mask, balance


def score_tokens(
    model: Model,
    h: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    details: bool = False,
    chunk: int | None = None,
) -> TokenScores:
    """Log-probability and entropy of `targets` under `softmax(unembed(h) / temperature)`.

    Args:
        model: only its `unembedding` is used.
        h: hidden states.
        targets: one token id a position.
        mask: positions to score; the others are 0 and cost nothing.
        temperature: divides the logits.
        entropy_gradient: let gradients flow through the entropy.
        details: also give what most methods do not look at, `mean_logit` and `collision`.
        chunk: positions of each row scored at a time; by default what CHUNK_BYTES holds.
    """
    options = {"temperature": temperature, "entropy_gradient": entropy_gradient, "details": details}
    scoring, inputs, in_place = _read(model, h, targets, mask, chunk, **options)
    return in_place(score_chunks(scoring, *inputs))


def _read(
    model: Model, h: Array, targets: Array, mask: Array, chunk: int | None = None, **options: Any
) -> tuple[Scoring, tuple[list[Array], Array, Array, Array], Callable[[TokenScores], TokenScores]]:
    """How tokens are scored, the arrays for it with the scored positions of each row first, and the way back."""
    rows, whole, _ = h.shape
    parts = _slices(whole)
    h, targets, mask = (_sliced(x, parts) for x in (h, targets, mask))
    batch, length, _ = h.shape
    width = jax.eval_shape(model.unembed, h[:, :1]).shape[-1]
    weights, tree = jax.tree.flatten(model.unembedding())
    size = min(length, chunk or _chunk_positions(batch, width))
    scoring = in_pieces(Scoring(tree, **options, size=size, width=width), h)
    room = -length % scoring.span(length)
    h = jnp.pad(h, [(0, 0), (0, room), (0, 0)])
    targets, mask = (jnp.pad(x, [(0, 0), (0, room)]) for x in (targets, mask))
    order = jnp.argsort(~mask, axis=1, stable=True)
    h = constrain(jnp.take_along_axis(h, order[:, :, None], axis=1), "tokens", None, None)
    counts = jnp.sum(mask, axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)
    back = jnp.argsort(order, axis=1)

    def in_place(x: Array) -> Array:
        return jnp.where(mask, jnp.take_along_axis(x, back, axis=1), 0.0)[:, :length].reshape(rows, -1)[:, :whole]

    return scoring, (weights, h, targets, counts), partial(jax.tree.map, in_place)


def _slices(length: int) -> int:
    """Of rows of so many tokens: the devices that each have a slice of."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else min(length, mesh.shape["context"])


def _sliced(x: Array, parts: int) -> Array:
    """[B, T, ...] -> [B parts, T / parts, ...]: the slices as rows of their own, the last one filled up."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % parts), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(len(x) * parts, -1, *x.shape[2:])


def _chunk_positions(batch: int, vocab_size: int) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    rows = max(1, batch // (1 if mesh.empty else token_groups(mesh)))
    size = CHUNK_BYTES_CPU if platform() == "cpu" else CHUNK_BYTES
    return max(1, size // (4 * rows * vocab_size))
