"""Adapters of a decoder: made, exchanged, switched off and merged."""

import dataclasses
import logging
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxpost.errors import ConfigError
from jaxpost.models.layers import Head
from jaxpost.models.lora import ADAPTERS, Adapter, Adapters, AdapterSet, Copy, FrozenLoRA, LoRA, LoRAParam, view
from jaxpost.models.lora_config import LoraConfig, PeftConfig, as_lora_config
from jaxpost.models.lora_init import (
    by_layer,
    check_place,
    mesh_of,
    module_at,
    new_arrays,
    placed,
    saved_copy,
    shape_of,
)
from jaxpost.models.lora_targets import Choice, Target, choose, is_all_linear, saved_targets, targets_of
from jaxpost.models.quant import Quantized, dense
from jaxpost.models.transformer import Decoder

REFERENCE = "reference"

_log = logging.getLogger("jaxpost")


def attach(model: Decoder, config: LoraConfig | PeftConfig, *, seed: int = 0, name: str = "default") -> Decoder:
    """Give a model a new adapter, in place, and use it.

    The model computes what it did: a new adapter adds nothing, and what is trained as a whole starts as a copy.
    The same seed draws the same adapter on every mesh.

    Args:
        model: a decoder; its own arrays stay what they are.
        config: ours, or a `peft.LoraConfig`.
        seed: of the random initialisation.
        name: of the adapter, to switch between several.

    Returns:
        The same model.

    Raises:
        ConfigError: a field that is not supported, a module that the model does not have, a rank beyond its size.
    """
    lora = as_lora_config(config)
    choices = [choice for choice in choose(lora, model.config, model.head_kind) if _fits(model, lora, choice)]
    saved = saved_targets(lora, model.config, model.head_kind)
    key = jax.random.key(seed)
    parts: dict[str, Adapter] = {}
    for choice in choices:
        path = choice.target.place
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        parts[path] = LoRA(new_arrays(model, lora, choice, own), choice.ranks, lora.lora_dropout)
    parts |= {target.place: saved_copy(model, target) for target in saved}
    return install(model, name, lora, parts)


def install(model: Decoder, name: str, config: LoraConfig, parts: dict[str, Adapter]) -> Decoder:
    """Hang modules on a model, in place, as its adapter `name`, by their places' paths, and use it."""
    if not name or "." in name:
        raise ConfigError(f"an adapter's name is a text without dots, not {name!r}")
    set_adapter(model, None)
    model.adapters = Adapters() if model.adapters is None else model.adapters
    model.adapters.sets[name] = AdapterSet(config)
    model.adapters.sets[name].parts.update({path: _retyped(part, FrozenLoRA) for path, part in parts.items()})
    return set_adapter(model, name)


def set_adapter(model: Decoder, name: str | None) -> Decoder:
    """Use the adapter of this name, or none, in place; nothing is copied. Only the one in use is trained.

    Raises:
        ConfigError: there is no such adapter.
    """
    known = sorted(model.adapters.sets) if model.adapters else []
    if name is not None and name not in known:
        raise ConfigError(f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}")
    if model.adapters is None:
        return model
    if model.adapters.active is not None:
        parts = model.adapters.sets[model.adapters.active].parts
        for path, part in active_parts(model).items():
            _hang(model, path, None)
            parts[path] = _retyped(part, FrozenLoRA)
    model.adapters.active = name
    if name is not None:
        for path, part in dict(model.adapters.sets[name].parts).items():
            del model.adapters.sets[name].parts[path]
            _hang(model, path, _retyped(part, LoRAParam))
    return model


def active_parts(model: Decoder) -> dict[str, Adapter]:
    """The modules of the adapter in use, by their places' paths."""
    modules = [(path, module) for path, module in nnx.iter_modules(model) if path[:1] != (ADAPTERS,)]
    return {".".join(map(str, path)): module for path, module in modules if isinstance(module, LoRA | Copy)}


def active_config(model: Decoder) -> LoraConfig | None:
    """How the adapter in use was made; None if there is none."""
    if model.adapters is None or model.adapters.active is None:
        return None
    return model.adapters.sets[model.adapters.active].config


def without_adapters(model: Decoder) -> Decoder:
    """The base on the same arrays: the reference of a run whose adapter is new."""
    return set_adapter(view(model), None)


def keep_reference(model: Decoder) -> Decoder:
    """Keep a copy of the adapter in use, in place, for `reference_view`: a run that goes on from it starts there."""
    config = active_config(model)
    if config is None or model.adapters is None:
        raise ConfigError("the model has no adapter to keep as the reference")
    kept = AdapterSet(config)
    for path, part in active_parts(model).items():
        graphdef, state = nnx.split(part)
        kept.parts[path] = _retyped(nnx.merge(graphdef, jax.tree.map(jnp.copy, state)), FrozenLoRA)
    model.adapters.sets[REFERENCE] = kept
    return model


def reference_view(model: Decoder) -> Decoder:
    """What a policy is compared with, on the same arrays: the adapter that `keep_reference` kept, or the base."""
    has_kept = model.adapters is not None and REFERENCE in model.adapters.sets
    return set_adapter(view(model), REFERENCE if has_kept else None)


def merge_adapter(model: Decoder) -> Decoder:
    """A model without adapters that computes what this one does with the adapter in use.

    Kernels that the adapter changes are new, in their own dtype (that of activations where they were quantised); the
    others are the same arrays. A tied head is tied no longer if its adapter, or the embedding's, is not the other's.
    """
    return _with_kernels(model, _kernels(model, mesh_of(model)))


def folded(model: Decoder) -> Decoder:
    """`merge_adapter` for an adapter that is folded in again and again: compiled once for all its kernels.

    The model itself where it has no adapter, or where the kernels would be rounded: an update is often smaller than a
    unit in the last place of bfloat16.
    """
    is_exact = model.embed.embedding[...].dtype == jnp.float32 and not any(
        isinstance(module, Quantized) for _, module in nnx.iter_modules(model)
    )
    return _with_kernels(model, _fold(model)) if is_exact and active_config(model) is not None else model


@jax.jit
def _fold(model: Decoder) -> dict[str, jax.Array]:
    return _kernels(model, None)


def _kernels(model: Decoder, mesh: Mesh | None) -> dict[str, jax.Array]:
    """What stands in the place of the kernels that the adapter changes, by their modules' paths."""
    kernels, parts = {}, active_parts(model)
    if _splits_tie(model):
        kernels["head"] = placed(lambda table: {"kernel": table.T}, "head", mesh, model.embed.embedding[...])["kernel"]
    for target in targets_of(model.config, model.head_kind):
        if target.place in parts:
            path = _path_of(target)
            kernel = nnx.Param(kernels[path]) if path in kernels else vars(module_at(model, path))[_kernel_name(path)]
            kernels[path] = _merged(model, target, parts[target.place], kernel, mesh)
    return kernels


def _merged(model: Decoder, target: Target, part: Adapter, kernel: Any, mesh: Mesh | None) -> jax.Array:
    """The kernel that does by itself what it does with its adapter."""
    dtype = model.compute.dtype if isinstance(kernel, Quantized) else kernel[...].dtype
    graphdef, stored = nnx.split((part, kernel))

    def of_layer(stored: Any) -> jax.Array:
        part, kernel = nnx.merge(graphdef, stored)
        return part.merged(dense(kernel, jnp.float32)).astype(dtype)

    path = _path_of(target)
    name = _kernel_name(path)
    return placed(lambda stored: {name: by_layer(of_layer, target.is_stacked, stored)}, path, mesh, stored)[name]


def _with_kernels(model: Decoder, kernels: dict[str, jax.Array]) -> Decoder:
    """The model without adapters and with these kernels in the place of its own; the others are the same arrays."""
    merged = view(model)
    if _splits_tie(model):
        config = dataclasses.replace(
            model.config, tie_embeddings=False, hf={**model.config.hf, "tie_word_embeddings": False}
        )
        head = nnx.eval_shape(lambda: Head(config.embed_dim, config.vocab_size, rngs=nnx.Rngs(0)))
        merged.head, merged.config, merged.layers.config = nnx.data(head), config, config
    for path, kernel in kernels.items():
        setattr(module_at(merged, path), _kernel_name(path), nnx.Param(kernel))
    set_adapter(merged, None).adapters = None
    return merged


def _path_of(target: Target) -> str:
    """The module whose kernel an adapter changes; a tied head gets one of its own."""
    return "head" if target.slot == "head_adapter" else target.path


def _kernel_name(path: str) -> str:
    return "embedding" if path == "embed" else "kernel"


def _splits_tie(model: Decoder) -> bool:
    """Whether a tied head's adapter, or the embedding's, is not the other's."""
    return model.head is None and bool(active_parts(model).keys() & {"embed.adapter", "embed.head_adapter"})


def _fits(model: Decoder, lora: LoraConfig, choice: Choice) -> bool:
    """Whether a place can take its adapter; False for one that `all-linear` leaves out.

    Raises:
        ConfigError: it was asked for, and cannot.
    """
    target, rank, sizes = choice.target, max(choice.ranks), shape_of(model, choice.target)[-2:]
    name = target.name.rpartition(".")[2]
    if target.is_parameter and (lora.lora_dropout or lora.use_dora):
        raise ConfigError(
            f"experts and routers ({target.path}) take neither lora_dropout nor use_dora, as in PEFT; "
            "set them to 0 and false, or leave these modules out"
        )
    check_place(model, lora, target)
    if rank <= min(sizes):
        return True
    if not is_all_linear(lora):
        raise ConfigError(f"r is {rank}, beyond the smaller dimension of {name} ({sizes[0]} x {sizes[1]})")
    _log.info("all-linear leaves out %s (%d x %d), which is smaller than the rank", target.path, *sizes)
    return False


def _retyped(part: Adapter, kind: type[nnx.Variable]) -> Adapter:
    """The module with what can be trained as Variables of this type, in place."""
    for name in ("lora_a", "lora_b", "magnitude", "kernel"):
        variable = vars(part).get(name)
        if variable is not None:
            setattr(part, name, kind(variable[...]))
    return part


def _hang(model: Decoder, place: str, part: Adapter | None) -> None:
    path, _, slot = place.rpartition(".")
    setattr(module_at(model, path), slot, part)
