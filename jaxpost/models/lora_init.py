"""What a new adapter starts as, as PEFT draws it, laid out on the mesh of the model that it is for."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Key

from jaxpost.errors import ConfigError
from jaxpost.models.lora import Copy, column_lengths
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.lora_targets import Choice, Target
from jaxpost.models.quant import Kernel, Quantized, dense
from jaxpost.models.transformer import Decoder
from jaxpost.sharding import parameter_spec


class Start(NamedTuple):
    """What a new adapter's arrays depend on beside the values of the kernel; places that are alike share a program.

    Attributes:
        graphdef: how the kernel is stored.
        shape: of the kernel as the place uses it, [..., in, out].
        ranks: of each layer, see `lora.LoRA`.
        init: one of `lora_config.INITS`.
        use_dora: with a magnitude.
        is_stacked: there are layers.
        is_transposed: the kernel is the transposed embedding.
    """

    graphdef: Any
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    init: str
    use_dora: bool
    is_stacked: bool
    is_transposed: bool

    def arrays(self, stored: Any, scale: Array, key: Key[Array, ""]) -> dict[str, Array]:
        """By name, for kernels as they are stored."""

        def matrix(stored: Any) -> Array:
            (kernel,) = nnx.merge(self.graphdef, stored)
            dense_kernel = dense(kernel, jnp.float32)
            return dense_kernel.T if self.is_transposed else dense_kernel

        ranks = jnp.asarray(self.ranks if self.is_stacked else self.ranks[0])
        if self.init in PRINCIPAL:
            begin = partial(PRINCIPAL[self.init], rank=max(self.ranks))
            a, b = by_layer(lambda stored, scale: begin(matrix(stored), scale), self.is_stacked, stored, scale)
        else:
            a, b = DRAWN[self.init](key, self.shape, max(self.ranks), ranks)
        a, b = _masked(a, b, ranks)
        arrays = {"lora_a": a, "lora_b": b, "scale": scale}
        if self.init in PRINCIPAL:
            arrays |= {"initial_a": jnp.copy(a), "initial_b": jnp.copy(b)}
        if self.use_dora:
            arrays["magnitude"] = by_layer(lambda stored: column_lengths(matrix(stored)), self.is_stacked, stored)
        return arrays


def new_arrays(model: Decoder, lora: LoraConfig, choice: Choice, key: Key[Array, ""]) -> dict[str, Array]:
    """The arrays of a new adapter at a place; the layer computes what it did."""
    target, mesh = choice.target, mesh_of(model)
    graphdef, stored = nnx.split((kernel_of(model, target),))
    start = Start(
        graphdef,
        shape_of(model, target),
        choice.ranks,
        "embedding" if target.place == "embed.adapter" else lora.init,
        lora.use_dora,
        target.is_stacked,
        target.slot == "head_adapter",
    )
    arguments = stored, scales(lora, choice), key
    if mesh is None:
        return _program(start, ())(*arguments)
    places = layout(target.place, jax.eval_shape(start.arrays, *arguments), mesh)
    return _program(start, tuple(places.items()))(*arguments)


@lru_cache(maxsize=256)
def _program(start: Start, places: tuple[tuple[str, NamedSharding], ...]) -> Callable[..., dict[str, Array]]:
    return jax.jit(start.arrays, out_shardings=dict(places) or None)


def scales(lora: LoraConfig, choice: Choice) -> Array:
    """The scale of each layer, 0 where it is left out; a scalar where there are no layers."""
    each = [lora.scale(*numbers) if numbers[0] else 0.0 for numbers in zip(choice.ranks, choice.alphas, strict=True)]
    return jnp.asarray(each if choice.target.is_stacked else each[0], jnp.float32)


def saved_copy(model: Decoder, target: Target) -> Copy:
    """A float32 copy of a kernel, to be trained in its place."""
    kernel = kernel_of(model, target)
    assert isinstance(kernel, nnx.Param)

    def make(kernel: Array) -> dict[str, Array]:
        kernel = kernel.T if target.slot == "head_adapter" else kernel
        return {"kernel": jnp.copy(kernel).astype(jnp.float32)}

    return Copy(placed(make, target.place, mesh_of(model), kernel[...])["kernel"])


def kernel_of(model: Decoder, target: Target) -> Kernel:
    """The kernel, or the embedding, as it is stored."""
    if target.path == "embed":
        return model.embed.embedding
    return module_at(model, target.path).kernel


def module_at(model: Any, path: str) -> Any:
    """The module at a path, e.g. `layers.attention.query`."""
    return reduce(getattr, path.split("."), model)


def shape_of(model: Decoder, target: Target) -> tuple[int, ...]:
    """Of the kernel as the place uses it: [..., in, out]."""
    kernel = kernel_of(model, target)
    *stack, num_inputs, num_outputs = kernel.shape if isinstance(kernel, Quantized) else kernel[...].shape
    inner = (num_outputs, num_inputs) if target.slot == "head_adapter" else (num_inputs, num_outputs)
    return (*stack, *inner)


def check_place(model: Decoder, lora: LoraConfig, target: Target) -> None:
    """Raise ConfigError if this kind of adapter cannot hang at a place."""
    if lora.use_dora and target.is_expert:
        raise ConfigError(f"{lora.source}: use_dora is not for experts ({target.path}); leave them out of the targets")
    if lora.init_lora_weights in SUBTRACTED and isinstance(kernel_of(model, target), Quantized):
        raise ConfigError(
            f"{lora.source}: init_lora_weights {lora.init_lora_weights} needs kernels that are not quantised; "
            "take true or gaussian, or load the base dense"
        )


def mesh_of(model: Decoder) -> Mesh | None:
    """Where a model lies; None if that is no mesh, or if the model is abstract."""
    embedding = model.embed.embedding[...]
    sharding = None if isinstance(embedding, Tracer) else embedding.sharding
    return cast(Mesh, sharding.mesh) if isinstance(sharding, NamedSharding) else None


def placed(make: Callable[..., dict[str, Array]], path: str, mesh: Mesh | None, *args: Any) -> dict[str, Array]:
    """The arrays that `make` returns, laid out as the sharding table has them at `path`."""
    if mesh is None:
        return jax.jit(make)(*args)
    return jax.jit(make, out_shardings=layout(path, jax.eval_shape(make, *args), mesh))(*args)


def layout(path: str, arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where arrays, or their shapes, go on a mesh, as the sharding table has it for those at `path`."""
    return {
        name: NamedSharding(mesh, parameter_spec(f"{path}.{name}", array.shape, mesh)) for name, array in arrays.items()
    }


def by_layer(function: Callable[..., Any], is_stacked: bool, *arguments: Any) -> Any:
    """A function of a layer's arrays, for all layers: one after another, so that one kernel is dense at a time."""
    return jax.lax.map(lambda each: function(*each), arguments) if is_stacked else function(*arguments)


def _default(key: Key[Array, ""], shape: tuple[int, ...], rank: int, ranks: Array) -> tuple[Array, Array]:
    """A is uniform; the bound is that of He et al., 2015, arXiv:1502.01852, for a slope of sqrt(5)."""
    a, b = _zeros(shape, rank)
    return jax.random.uniform(key, a.shape, minval=-1.0) / math.sqrt(shape[-2]), b


def _gaussian(key: Key[Array, ""], shape: tuple[int, ...], rank: int, ranks: Array) -> tuple[Array, Array]:
    """A is normal with deviation 1 / r."""
    a, b = _zeros(shape, rank)
    return jax.random.normal(key, a.shape) / jnp.maximum(_over(ranks, a.ndim), 1), b


def _of_embedding(key: Key[Array, ""], shape: tuple[int, ...], rank: int, ranks: Array) -> tuple[Array, Array]:
    """B is normal, and A is 0."""
    a, b = _zeros(shape, rank)
    return a, jax.random.normal(key, b.shape)


def _zeros(shape: tuple[int, ...], rank: int) -> tuple[Array, Array]:
    *stack, num_inputs, num_outputs = shape
    return jnp.zeros((*stack, num_inputs, rank)), jnp.zeros((*stack, rank, num_outputs))


def _masked(a: Array, b: Array, ranks: Array) -> tuple[Array, Array]:
    """A and B with zeros beyond each layer's rank."""
    keep = jnp.arange(a.shape[-1]) < _over(ranks, a.ndim)
    return jnp.where(keep, a, 0), jnp.where(keep.swapaxes(-1, -2), b, 0)


def _over(numbers: Array, ndim: int) -> Array:
    """A number for each layer, to be broadcast over the layer's array."""
    return numbers.reshape(numbers.shape + (1,) * (ndim - numbers.ndim))


def _pissa(
    kernel: Float[Array, "*stack in out"], scale: Float[Array, ""], rank: int
) -> tuple[Float[Array, "*stack in R"], Float[Array, "*stack R out"]]:
    """The principal part of a kernel: s A B has its largest singular values (Meng et al., 2024, arXiv:2404.02948)."""
    left, values, right = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(values[..., :rank] / jnp.where(scale == 0, 1.0, scale))
    return left[..., :, :rank] * root[..., None, :], root[..., :, None] * right[..., :rank, :]


def _olora(
    kernel: Float[Array, "*stack in out"], scale: Float[Array, ""], rank: int
) -> tuple[Float[Array, "*stack in R"], Float[Array, "*stack R out"]]:
    """An orthonormal B, from the QR decomposition of the kernel [out, in] (Büyükakyüz, 2024, arXiv:2406.01775)."""
    q, r = jnp.linalg.qr(kernel.swapaxes(-1, -2))
    return r[..., :rank, :].swapaxes(-1, -2), q[..., :, :rank].swapaxes(-1, -2)


DRAWN = {"default": _default, "gaussian": _gaussian, "embedding": _of_embedding}
PRINCIPAL = {"pissa": _pissa, "olora": _olora}
SUBTRACTED = tuple(PRINCIPAL)  # they begin with a part of the kernel, which is taken off again
