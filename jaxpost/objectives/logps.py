"""Per-token log-probabilities and entropy without ever holding `[B, T, V]` logits.

Hidden states are scored in chunks along T. The scored positions of each row are moved to the front first, so chunks
that hold none (prompts, padding) cost nothing. The backward pass computes each chunk's logits again, as in Wijmans et
al., 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009. Where the head is frozen it need not
do so: the gradient of a token's log-probability is one vector, which the forward pass keeps while it has the logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool, Float, Int

from jaxpost.objectives.base import Batch, Model
from jaxpost.platform import platform
from jaxpost.sharding import by_rows, constrain, token_groups

CHUNK_BYTES = 64 * 2**20  # of float32 logits on a device
CHUNK_BYTES_CPU = 24 * 2**20  # whose products are as fast with few rows, so that a last chunk wastes less


class TokenScores(NamedTuple):
    """What a model says of given tokens; 0 where the mask is 0.

    Attributes:
        logps: log-probability of each target, nats.
        entropy: of the whole distribution, nats; carries no gradient unless asked for.
        top: 1 where the target is the most probable token; carries no gradient.
        mean_logit: over the vocabulary; 0 unless asked for; carries no gradient.
        collision: log of the sum of the squared probabilities, nats; 0 unless asked for; carries no gradient.
    """

    logps: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    top: Float[Array, "B T"]
    mean_logit: Float[Array, "B T"]
    collision: Float[Array, "B T"]


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
    rows, whole, _ = h.shape
    parts = _slices(whole)
    h, targets, mask = (_sliced(x, parts) for x in (h, targets, mask))
    batch, length, _ = h.shape
    width = jax.eval_shape(model.unembed, h[:, :1]).shape[-1]
    size = min(length, chunk or _chunk_positions(batch, width))
    room = -length % size
    h = jnp.pad(h, [(0, 0), (0, room), (0, 0)])
    targets, mask = (jnp.pad(x, [(0, 0), (0, room)]) for x in (targets, mask))
    order = jnp.argsort(~mask, axis=1, stable=True)
    h = constrain(jnp.take_along_axis(h, order[:, :, None], axis=1), "tokens", None, None)
    counts = jnp.sum(mask, axis=1)
    weights, tree = jax.tree.flatten(model.unembedding())
    options = {"temperature": temperature, "entropy_gradient": entropy_gradient, "details": details}
    score = partial(_score_chunk, tree, **options)
    scores = _score_chunks(score, size, weights, h, jnp.take_along_axis(targets, order, axis=1), counts)
    back = jnp.argsort(order, axis=1)

    def in_place(x: Array) -> Array:
        return jnp.where(mask, jnp.take_along_axis(x, back, axis=1), 0.0)[:, :length].reshape(rows, -1)[:, :whole]

    return jax.tree.map(in_place, scores)


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


def _score_chunk(
    unembedding: Any,
    weights: list[Array],
    h: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    *,
    temperature: float,
    entropy_gradient: bool,
    details: bool,
) -> TokenScores:
    # One row a token: XLA on CPU spreads work over the leading dimension.
    logits = unembedding.unflatten(weights)(h.reshape(-1, h.shape[-1])).astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
    peak = lax.stop_gradient(jnp.max(logits, axis=-1))
    shifted = jnp.exp(logits - peak[:, None])
    mass = jnp.sum(shifted, axis=-1)
    normalizer = peak + jnp.log(mass)
    entropy = normalizer - jnp.sum(shifted * logits, axis=-1) / mass
    if not entropy_gradient:
        entropy = lax.stop_gradient(entropy)
    top = lax.stop_gradient((chosen >= peak).astype(jnp.float32))
    mean_logit = collision = jnp.zeros_like(top)
    if details:
        mean_logit = lax.stop_gradient(jnp.mean(logits, axis=-1))
        collision = lax.stop_gradient(jnp.log(jnp.sum(shifted * shifted, axis=-1)) - 2 * jnp.log(mass))
    parts = (chosen - normalizer, entropy, top, mean_logit, collision)
    return TokenScores(*(x.reshape(targets.shape) for x in parts))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _score_chunks(
    score: Callable[..., TokenScores], size: int, weights: list[Array], h: Array, targets: Array, counts: Array
) -> TokenScores:
    """Score the first `counts` [B] positions of each row, in chunks of `size`."""

    def run(weights: list[Array], h: Array, targets: Array, counts: Array) -> TokenScores:
        def body(index: Array, scores: TokenScores) -> TokenScores:
            part = score(weights, _window(h, index, size), _window(targets, index, size))
            return jax.tree.map(lambda whole, new: _put_window(whole, new, index, size), scores, part)

        return lax.fori_loop(0, _chunks(counts, size), body, _no_scores(targets))

    return by_rows(run, _as_computed(weights, h), h, targets, counts)


class _Saved(NamedTuple):
    """What the backward pass needs: the gradient of each log-probability, or where that is not kept, the rest."""

    slopes: Array | None = None  # [B, T, D]
    inputs: tuple[list[Array], Array, Array, Array] | None = None


def _forward(
    score: partial[TokenScores], size: int, weights: list[Any], h: Any, targets: Any, counts: Any
) -> tuple[TokenScores, _Saved]:
    inputs = ([weight.value for weight in weights], h.value, targets.value, counts.value)
    if any(weight.perturbed for weight in weights) or score.keywords["entropy_gradient"]:
        return _score_chunks(score, size, *inputs), _Saved(inputs=inputs)
    scores, slopes = _score_with_slopes(score, size, *inputs)
    return scores, _Saved(slopes=slopes)


def _score_with_slopes(
    score: Callable[..., TokenScores], size: int, weights: list[Array], h: Array, targets: Array, counts: Array
) -> tuple[TokenScores, Float[Array, "B T D"]]:
    """The scores, and the gradient of each token's log-probability with respect to its hidden state."""

    def run(weights: list[Array], h: Array, targets: Array, counts: Array) -> tuple[TokenScores, Array]:
        def body(index: Array, carry: tuple[TokenScores, Array]) -> tuple[TokenScores, Array]:
            def total(x: Array) -> tuple[Array, TokenScores]:
                part = score(weights, x, _window(targets, index, size))
                return jnp.sum(part.logps), part

            slopes, part = jax.grad(total, has_aux=True)(_window(h, index, size))
            scores = jax.tree.map(lambda whole, new: _put_window(whole, new, index, size), carry[0], part)
            return scores, _put_window(carry[1], slopes, index, size)

        return lax.fori_loop(0, _chunks(counts, size), body, (_no_scores(targets), jnp.zeros_like(h)))

    return by_rows(run, _as_computed(weights, h), h, targets, counts)


def _backward(score: Callable[..., TokenScores], size: int, saved: _Saved, cotangents: TokenScores) -> tuple:
    cotangents = jax.tree.map(_dense, cotangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    if saved.inputs is None:
        assert saved.slopes is not None
        return None, (saved.slopes * cotangents.logps[:, :, None]).astype(saved.slopes.dtype), None, None
    given, h, targets, counts = saved.inputs

    def zeros(weight: Array) -> Array | None:
        # The others are keys of dropout.
        return jnp.zeros(weight.shape, weight.dtype) if jnp.issubdtype(weight.dtype, jnp.inexact) else None

    def run(
        weights: list[Array], h: Array, targets: Array, counts: Array, cotangents: TokenScores
    ) -> tuple[list[Array | None], Array]:
        def body(index: Array, gradients: tuple[list[Array | None], Array]) -> tuple[list[Array | None], Array]:
            of_weights, of_h = gradients
            chunk = partial(score, targets=_window(targets, index, size))
            _, pull = jax.vjp(chunk, weights, _window(h, index, size))
            new_weights, new_h = pull(jax.tree.map(lambda c: _window(c, index, size), cotangents))
            pairs = zip(of_weights, new_weights, strict=True)
            added = [None if total is None else total + new.astype(total.dtype) for total, new in pairs]
            return added, _put_window(of_h, new_h, index, size)

        return lax.fori_loop(0, _chunks(counts, size), body, ([*map(zeros, given)], jnp.zeros_like(h)))

    of_weights, of_h = by_rows(run, _as_computed(given, h), h, targets, counts, cotangents, sums=True)
    return of_weights, of_h, None, None


_score_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunks(counts: Int[Array, "B"], size: int) -> Int[Array, ""]:
    """How many hold scored positions; only known at run time."""
    return (jnp.max(counts) + size - 1) // size


def _as_computed(weights: list[Array], h: Array) -> list[Array]:
    """Matrices in the dtype that they are multiplied in, so that no more than that moves between devices."""
    return [weight.astype(h.dtype) if weight.ndim > 1 and weight.dtype == jnp.float32 else weight for weight in weights]


def _dense(cotangent: Any) -> Array:
    """A cotangent as an array, also where it is known to be zero."""
    return cotangent if isinstance(cotangent, Array) else jnp.zeros(cotangent.shape, cotangent.dtype)


def _no_scores(targets: Array) -> TokenScores:
    return TokenScores(*[jnp.zeros(targets.shape, jnp.float32)] * len(TokenScores._fields))


def _window(x: Array, index: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _put_window(whole: Array, part: Array, index: Array, size: int) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, index * size, axis=1)
