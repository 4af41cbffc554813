"""Softmax over a vocabulary whose logits are never all there: chunks of tokens, and on many devices pieces of the head.

The backward pass computes the logits again, as in Wijmans et al., 2024, "Cut Your Losses in Large-Vocabulary Language
Models", arXiv:2411.09009. Where the head is frozen it need not do so: the gradient of a token's log-probability is one
vector, which the forward pass finds while it has the logits. Nor where a loss is a sum of what each log-probability
alone decides: the forward pass then finds all gradients (Hsu et al., 2024, "Liger Kernel", arXiv:2410.10989).

A head that is trained, and of which each device has a slice, is gathered a piece of the vocabulary at a time, and its
gradient given back to the slices likewise: neither is ever whole on a device.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from jaxpost.metrics import Mean, masked_mean
from jaxpost.objectives.tally import Tally, TokenScores, slopes
from jaxpost.sharding import TOKEN_AXES, by_rows, mesh_axes, token_groups

TokenLoss = Callable[[Array], Array]  # of log-probabilities, each from itself alone
PIECE_BYTES = 128 * 2**20  # of the float32 gradient of a piece of the head


class Scoring(NamedTuple):
    """How tokens are scored.

    Attributes:
        unembedding: the structure of `Model.unembedding`, without its arrays.
        size: positions of a row whose logits are all there at a time; h has a multiple of `span` of them.
        width: of the vocabulary.
        temperature: divides the logits.
        entropy_gradient: whether gradients flow through the entropy.
        details: whether `mean_logit` and `collision` are found.
        pieces: of the vocabulary. Of several, `unembedding` has one array, which is split over token axes alone.
    """

    unembedding: Any
    size: int
    width: int
    temperature: float = 1.0
    entropy_gradient: bool = False
    details: bool = False
    pieces: int = 1

    def logits(self, weights: list[Array], h: Float[Array, "B C D"]) -> Float[Array, "N V"]:
        """One row a token: XLA on CPU spreads work over the leading dimension."""
        head = self.unembedding.unflatten(weights)
        return head(h.reshape(-1, h.shape[-1])).astype(jnp.float32) / self.temperature

    def places(self, targets: Int[Array, "B C"], piece: Any) -> Int[Array, "N 1"]:
        """Where the targets are in a piece of the vocabulary; others are outside of it."""
        return targets.reshape(-1, 1) - piece * (self.width // self.pieces)

    def span(self, length: int) -> int:
        """Positions of a row of such a length that are scored at a time: more, where it is by a piece alone."""
        return self.size * min(self.pieces, -(-length // self.size))

    def said(self, tally: Tally) -> TokenScores:
        """What is said of tokens, once all of their logits were seen."""
        return tally.scores(self.width, details=self.details)


def in_pieces(scoring: Scoring, h: Float[Array, "B T D"]) -> Scoring:
    """The same with as many pieces of the vocabulary as the devices should take it in."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] > 1 or scoring.unembedding.num_leaves > 1 or h.shape[-1] == scoring.width:
        return scoring
    if token_groups(mesh) == 1 or len(h) % token_groups(mesh):
        return scoring
    wanted = max(1, math.ceil(4 * scoring.width * h.shape[-1] / PIECE_BYTES))
    return scoring._replace(pieces=next(n for n in range(wanted, scoring.width + 1) if scoring.width % n == 0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def score_chunks(scoring: Scoring, weights: list[Array], h: Array, targets: Array, counts: Array) -> TokenScores:
    """Score the first `counts` [B] positions of each row; what it gives of the others is of no use."""
    return scoring.said(_tally(scoring, weights, h, targets, counts))


class _Saved(NamedTuple):
    """What the backward pass needs: the gradient of each log-probability, or where that is not kept, the rest."""

    slopes: Array | None = None  # [B, T, D]
    inputs: tuple[list[Array], Array, Array, Array] | None = None
    known: tuple[Array, Array] | None = None  # normalizer and entropy, [B, T]


def _forward(scoring: Scoring, weights: list[Any], h: Any, targets: Any, counts: Any) -> tuple[TokenScores, _Saved]:
    inputs = ([weight.value for weight in weights], h.value, targets.value, counts.value)
    if any(weight.perturbed for weight in weights) or scoring.entropy_gradient:
        tally = _tally(scoring, *inputs)
        return scoring.said(tally), _Saved(inputs=inputs, known=(tally.normalizer, tally.entropy))
    # Of a "loss" that is the log-probability itself.
    _, (tally, found) = _tally_with_gradients(scoring._replace(pieces=1), jnp.positive, False, *inputs)
    return scoring.said(tally), _Saved(slopes=found)


def _tally(scoring: Scoring, weights: list[Array], h: Array, targets: Array, counts: Array) -> Tally:
    size = scoring.span(h.shape[1])

    def run(weights: list[Array], h: Array, targets: Array, counts: Array) -> Tally:
        def of_piece(piece: Any, tally: Tally) -> Tally:
            part = _piece(scoring, weights, h, piece)

            def of_chunk(index: Array, tally: Tally) -> Tally:
                at = partial(_window, index=index, size=size)
                logits = scoring.logits(part, at(h))
                seen = Tally.of(logits, scoring.places(at(targets), piece), details=scoring.details)
                seen = jax.tree.map(lambda x: x.reshape(len(h), -1), seen)
                joined = seen if scoring.pieces == 1 else jax.tree.map(at, tally).joined(seen)
                return jax.tree.map(partial(_put_window, index=index, size=size), tally, joined)

            return lax.fori_loop(0, _chunks(counts, size), of_chunk, tally)

        return _each(scoring, of_piece, Tally.nothing(targets.shape))

    return _on_devices(scoring, run, weights, h, targets, counts)


def _tally_with_gradients(
    scoring: Scoring,
    token_loss: TokenLoss,
    is_trained: bool,
    weights: list[Array],
    h: Array,
    targets: Array,
    counts: Array,
) -> tuple[list[Array | None], tuple[Tally, Float[Array, "B T D"]]]:
    """And the gradients of the tokens' losses, found while all logits of a token are there.

    Returns:
        (with respect to the weights, none if they are not trained; (tally, with respect to the hidden states)).
    """
    dtypes, size = [weight.dtype for weight in weights], scoring.size

    def run(weights: list[Array], h: Array, targets: Array, counts: Array) -> tuple[list, tuple[Tally, Array]]:
        scored, trained = _scored(h, counts), weights if is_trained else []

        def of_chunk(index: Array, carry: tuple[list, tuple[Tally, Array]]) -> tuple[list, tuple[Tally, Array]]:
            of_weights, found = carry
            at = partial(_window, index=index, size=size)
            places = scoring.places(at(targets), 0)
            logits, pull = jax.vjp(lambda head, h: scoring.logits(head or weights, h), trained, at(h))
            seen = Tally.of(logits, places, details=scoring.details)
            of_logps = jax.grad(lambda logps: jnp.sum(token_loss(logps)))(scoring.said(seen).logps)
            of_logps = jnp.where(at(scored).reshape(-1), of_logps, 0.0)
            known = _columns((seen.normalizer, seen.entropy, of_logps, None))
            new_weights, new_h = pull(slopes(logits, places, *known))
            new = jax.tree.map(lambda x: x.reshape(len(h), -1), seen), new_h
            found = jax.tree.map(partial(_put_window, index=index, size=size), found, new)
            return _added(of_weights, new_weights), found

        nothing = [*map(_zeros, trained, dtypes)], (Tally.nothing(targets.shape), jnp.zeros_like(h))
        return lax.fori_loop(0, _chunks(counts, size), of_chunk, nothing)

    return _on_devices(scoring, run, weights, h, targets, counts, sums=True)


def _backward(scoring: Scoring, saved: _Saved, cotangents: TokenScores) -> tuple:
    cotangents = jax.tree.map(_dense, cotangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    if saved.slopes is not None:
        of_h = saved.slopes * cotangents.logps[:, :, None]
        return None, of_h.astype(saved.slopes.dtype), None, None
    assert saved.inputs is not None and saved.known is not None
    weights, h, targets, counts = saved.inputs
    dtypes, size = [weight.dtype for weight in weights], scoring.span(h.shape[1])
    known = *saved.known, cotangents.logps, cotangents.entropy if scoring.entropy_gradient else None

    def run(weights: list[Array], h: Array, targets: Array, counts: Array, known: Any) -> tuple[list, Array]:
        def of_piece(piece: Any, gradients: tuple[list, Array]) -> tuple[list, Array]:
            part = _piece(scoring, weights, h, piece)

            def of_chunk(index: Array, gradients: tuple[list, Array]) -> tuple[list, Array]:
                of_part, of_h = gradients
                at = partial(_window, index=index, size=size)
                logits, pull = jax.vjp(scoring.logits, part, at(h))
                places = scoring.places(at(targets), piece)
                new_part, new_h = pull(slopes(logits, places, *_columns(jax.tree.map(at, known))))
                return _added(of_part, new_part), _put_window(of_h, at(of_h) + new_h, index, size)

            nothing = [*map(_zeros, part, dtypes)]
            of_part, of_h = lax.fori_loop(0, _chunks(counts, size), of_chunk, (nothing, gradients[1]))
            return _put_piece(scoring, gradients[0], of_part, h, piece), of_h

        # A sum over pieces is not rounded before its end.
        of_h = jnp.zeros(h.shape, h.dtype if scoring.pieces == 1 else jnp.float32)
        of_weights, of_h = _each(scoring, of_piece, ([*map(_zeros, weights, dtypes)], of_h))
        return of_weights, of_h.astype(h.dtype)

    of_weights, of_h = _on_devices(scoring, run, weights, h, targets, counts, known, sums=True)
    return of_weights, of_h, None, None


score_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_losses(
    scoring: Scoring, token_loss: TokenLoss, weights: list[Array], h: Array, targets: Array, counts: Array
) -> tuple[Mean, TokenScores]:
    """The losses of the first `counts` [B] positions of each row, added up, and their scores, without a gradient.

    Of a vocabulary in one piece; its logits are computed once.
    """
    return _summed(scoring, token_loss, _tally(scoring, weights, h, targets, counts), counts)


def _sum_forward(
    scoring: Scoring, token_loss: TokenLoss, weights: list[Any], h: Any, targets: Any, counts: Any
) -> tuple[tuple[Mean, TokenScores], tuple[list[Array | None], Array]]:
    inputs = [weight.value for weight in weights], h.value, targets.value, counts.value
    is_trained = any(weight.perturbed for weight in weights)
    of_weights, (tally, of_h) = _tally_with_gradients(scoring, token_loss, is_trained, *inputs)
    return _summed(scoring, token_loss, tally, counts.value), (of_weights, of_h)


def _sum_backward(
    scoring: Scoring, token_loss: TokenLoss, saved: tuple[list[Array | None], Array], cotangents: tuple[Mean, Any]
) -> tuple:
    factor = _dense(cotangents[0].total)
    of_weights, of_h = jax.tree.map(lambda x: (x * factor).astype(x.dtype), saved)
    return of_weights or None, of_h, None, None


sum_losses.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


def _summed(scoring: Scoring, token_loss: TokenLoss, tally: Tally, counts: Array) -> tuple[Mean, TokenScores]:
    scores = scoring.said(tally)
    return masked_mean(token_loss(scores.logps), _scored(scores.logps, counts)), scores


def _scored(rows: Array, counts: Int[Array, "B"]) -> Array:
    """Which positions of each row are among its first `counts`, bool [B, T]."""
    return jnp.arange(rows.shape[1]) < counts[:, None]


def _added(totals: list[Array | None], more: list[Array]) -> list[Array | None]:
    """Gradients added up; None where none is wanted."""
    pairs = zip(totals, more, strict=True)
    return [None if total is None else total + new.astype(total.dtype) for total, new in pairs]


def _columns(values: Any) -> Any:
    """Numbers of tokens, to stand beside rows of logits."""
    return jax.tree.map(lambda x: x.reshape(-1, 1), values)


def _on_devices(
    scoring: Scoring, run: Callable[..., Any], weights: list[Array], h: Array, *rows: Any, sums: bool = False
) -> Any:
    """`run` for the rows of each group of devices; of a head in pieces they have what is theirs anyway."""
    # Matrices are in the dtype that they are multiplied in, so that no more than that moves between devices.
    weights = [
        weight.astype(h.dtype) if weight.ndim > 1 and weight.dtype == jnp.float32 else weight for weight in weights
    ]
    specs = None
    if scoring.pieces > 1:
        axes: list[Any] = [None, None]
        axes[1 - _vocab(scoring, weights[0])] = _axes(h)
        specs = [P(*axes)]
    return by_rows(run, weights, h, *rows, sums=sums, specs=specs)


def _each(scoring: Scoring, of_piece: Callable[[Any, Any], Any], start: Any) -> Any:
    """What is left after all pieces."""
    return of_piece(0, start) if scoring.pieces == 1 else lax.fori_loop(0, scoring.pieces, of_piece, start)


def _piece(scoring: Scoring, weights: list[Array], h: Array, piece: Any) -> list[Array]:
    """The arrays of a piece of the vocabulary, whole."""
    if scoring.pieces == 1:
        return weights
    vocab, size = _vocab(scoring, weights[0]), scoring.width // scoring.pieces
    part = lax.dynamic_slice_in_dim(weights[0], piece * size, size, axis=vocab)
    return [lax.all_gather(part, _axes(h), axis=1 - vocab, tiled=True) if _axes(h) else part]


def _put_piece(scoring: Scoring, whole: list[Array | None], part: list[Array | None], h: Array, piece: Any) -> list:
    """Gradients with those of a piece, added up over the devices, each of which keeps what is its own."""
    if scoring.pieces == 1:
        return part
    [total], [new] = whole, part
    assert total is not None and new is not None
    vocab, axes = _vocab(scoring, total), _axes(h)
    if axes:
        new = lax.psum_scatter(new, axes, scatter_dimension=1 - vocab, tiled=True)
    new = lax.psum(new, tuple(axis for axis in TOKEN_AXES if axis not in axes))
    return [lax.dynamic_update_slice_in_dim(total, new, piece * new.shape[vocab], axis=vocab)]


def _axes(h: Array) -> tuple[str, ...]:
    """Mesh axes that the other dimension of a head is split over."""
    return mesh_axes("embed", h.shape[-1], jax.sharding.get_abstract_mesh())


def _vocab(scoring: Scoring, head: Array) -> int:
    return head.shape.index(scoring.width)


def _zeros(weight: Array, dtype: Any) -> Array | None:
    # The others are keys of dropout.
    return jnp.zeros(weight.shape, dtype) if jnp.issubdtype(dtype, jnp.inexact) else None


def _chunks(counts: Int[Array, "B"], size: int) -> Int[Array, ""]:
    """How many hold scored positions; only known at run time."""
    return (jnp.max(counts) + size - 1) // size


def _dense(cotangent: Any) -> Array:
    """A cotangent as an array, also where it is known to be zero."""
    return cotangent if isinstance(cotangent, Array) else jnp.zeros(cotangent.shape, cotangent.dtype)


def _window(x: Array, index: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _put_window(whole: Array, part: Array, index: Array, size: int) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, index * size, axis=1)
