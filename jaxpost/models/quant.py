"""QLoRA's frozen base: kernels of the blocks stored in few bits, dense only where and while they are used.

Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314. Embedding, head, routers,
norms and biases keep their dtype. Parts of quantised kernels are Variables of a type of their own, so that nothing
takes them for trainable.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.models.nf4 import Parts, dequantize_int8, dequantize_nf4, quantize_int8, quantize_nf4
from jaxpost.options import Group, check_choices, one_of, option
from jaxpost.sharding import parameter_spec

KEPT = ("router", "shared_share", "adapter")  # modules of the blocks whose kernels stay as they are


class Scheme(NamedTuple):
    """A way to store kernels: functions of arrays, see `models.nf4`."""

    quantize: Callable[[Array], Parts]
    dequantize: Callable[[Parts, Any], Array]


SCHEMES = {
    "nf4": Scheme(quantize_nf4, dequantize_nf4),
    "nf4_plain": Scheme(partial(quantize_nf4, nested=False), dequantize_nf4),
    "int8": Scheme(quantize_int8, dequantize_int8),
}


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """In how many bits the frozen base of adapters is stored; named as in TRL's ModelConfig."""

    help_group = Group.ADAPTER

    load_in_4bit: bool = option(False, "Store the kernels of the frozen base in 4 bits (QLoRA).")
    load_in_8bit: bool = option(False, "Store the kernels of the frozen base in 8 bits.")
    bnb_4bit_quant_type: str = option("nf4", "Data type of load_in_4bit: nf4.", choices=("nf4",))
    use_bnb_nested_quant: bool = option(
        True, "Store the scales of load_in_4bit in 8 bits, as QLoRA does: 0.516 instead of 0.5625 bytes a weight."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit exclude each other; remove one of them")

    def quantization(self) -> str | None:
        """What `load` and `from_pretrained` take."""
        if self.load_in_4bit:
            return "nf4" if self.use_bnb_nested_quant else "nf4_plain"
        return "int8" if self.load_in_8bit else None


class Frozen(nnx.Variable):
    """Part of a quantised kernel; it never gets a gradient."""


class Quantized(nnx.Module):
    """A kernel [..., in, out], alone or stacked, as the parts that a scheme stores it in."""

    def __init__(self, scheme: str, parts: Parts):
        self.scheme = scheme
        for name, part in parts.items():
            setattr(self, name, Frozen(part))

    def parts(self) -> Any:
        """What it consists of, by name: arrays, or their shapes and dtypes if it is abstract."""
        return nnx.to_pure_dict(nnx.state(self))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel."""
        return jax.eval_shape(lambda parts: SCHEMES[self.scheme].dequantize(parts, jnp.float32), self.parts()).shape


Kernel = nnx.Param | Quantized


def dense(kernel: Kernel, dtype: Any) -> Float[Array, "*stack in out"]:
    """The kernel in this dtype, whatever it is stored as."""
    if isinstance(kernel, Quantized):
        return SCHEMES[kernel.scheme].dequantize(kernel.parts(), dtype)
    return kernel[...].astype(dtype)


def with_dense(function: Callable[..., Any], x: Array, *kernels: Kernel) -> Any:
    """`function(x, *kernels)` with dense kernels in the dtype of `x`.

    The backward pass makes quantised kernels dense again: kept, those of all layers would be the model that was not to
    be in memory. What else `function` computes follows the rules of the checkpoint around it.
    """
    if not any(isinstance(kernel, Quantized) for kernel in kernels):
        return function(x, *(dense(kernel, x.dtype) for kernel in kernels))
    graphdef, stored = nnx.split(kernels)

    def run(x: Array, stored: Any) -> Any:
        return function(x, *(dense(kernel, x.dtype) for kernel in nnx.merge(graphdef, stored)))

    return jax.checkpoint(run, prevent_cse=False)(x, stored)


def for_schemes(path: str) -> bool:
    """Whether schemes are for the parameter at this path, e.g. `layers.mlp.up.kernel`."""
    *modules, name = path.split(".")
    return modules[0] == "layers" and name == "kernel" and modules[-1] not in KEPT


def quantize(model: nnx.Module, scheme: str) -> Any:
    """Store the kernels of a decoder's blocks in few bits, in place; returns the model.

    Kernels that are quantised already stay as they are. Nothing is said of where the parts lie on a mesh;
    `models.hf.place` lays them out by the sharding table.
    """
    one_of("quantization", scheme, tuple(SCHEMES))
    for module in _holders(model):
        if not isinstance(module.kernel, Quantized):
            module.kernel = Quantized(scheme, jax.jit(SCHEMES[scheme].quantize)(module.kernel[...]))
    return model


def dequantize(model: nnx.Module, dtype: str) -> Any:
    """The reverse: kernel after kernel becomes a dense parameter, in place; returns the model.

    What was rounded away stays away. `save_pretrained` takes the result, also of a model that adapters were merged in.
    """
    for module in _holders(model):
        if isinstance(module.kernel, Quantized):
            module.kernel = nnx.Param(jax.jit(dense, static_argnums=1)(module.kernel, dtype))
    return model


def check_dense(model: nnx.Module) -> None:
    """Raise ConfigError if kernels of the model are quantised."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Quantized):
            raise ConfigError(
                f"{'.'.join(map(str, path))} is stored as {module.scheme}: this is a base of adapters, not a model to "
                "save; save the adapter, or make it dense with jaxpost.models.quant.dequantize(model, dtype)"
            )


def _holders(model: nnx.Module) -> list[Any]:
    """The modules whose `kernel` is for schemes."""
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return [module for path, module in modules.items() if "kernel" in vars(module) and for_schemes(f"{path}.kernel")]


def collect(kernels: Iterable[Array], path: str, shape: tuple[int, ...], scheme: str, mesh: Mesh) -> Parts:
    """Quantise a stacked kernel whose dense whole is never in memory.

    Args:
        kernels: [in, out] each, in the order of the stack; one is taken when the one before is stored.
        path: of the parameter, which the sharding table knows.
        shape: of the whole, [..., in, out].
        scheme: a name of SCHEMES.
        mesh: where the parts go.
    """
    whole = jax.eval_shape(SCHEMES[scheme].quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    specs = {name: parameter_spec(f"{path}.{name}", part.shape, mesh) for name, part in whole.items()}
    layout = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    parts = {name: jnp.zeros(part.shape, part.dtype, device=layout[name]) for name, part in whole.items()}
    for at, kernel in zip(np.ndindex(*shape[:-2]), kernels, strict=True):
        parts = jax.block_until_ready(_put(parts, kernel, tuple(map(np.int32, at)), scheme, tuple(layout.items())))
    return parts


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _put(
    parts: Parts, kernel: Array, at: tuple[Array, ...], scheme: str, layout: tuple[tuple[str, NamedSharding], ...]
) -> Parts:
    """Store a kernel [in, out] at its place in the stack."""
    new = SCHEMES[scheme].quantize(kernel.reshape(*[1] * len(at), *kernel.shape))
    result = {}
    for name, sharding in layout:
        starts = (*at, *[0] * (parts[name].ndim - len(at)))
        whole = jax.lax.dynamic_update_slice(parts[name], new[name], starts)
        result[name] = jax.lax.with_sharding_constraint(whole, sharding)
    return result
