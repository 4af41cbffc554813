"""From the tensors of a PEFT file to the modules that hang on a model."""

from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpost.errors import ConfigError
from jaxpost.models.lora import Adapter, Copy, LoRA
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.lora_init import SUBTRACTED, check_place, kernel_of, layout, mesh_of, new_arrays, scales, shape_of
from jaxpost.models.lora_targets import Choice, Target, targets_of
from jaxpost.models.peft_folder import AdapterFolder
from jaxpost.models.peft_tensors import from_peft, modules_of, on_host, read_name
from jaxpost.models.transformer import Decoder

SHOWN = 5  # names of a kind in a message
COARSE = 2.0**-7  # relative error of bfloat16


class Named(NamedTuple):
    """A tensor with its name in the file."""

    name: str
    tensor: np.ndarray


Pieces = dict[str, Named]  # by kind, see `peft_tensors.KINDS`
Place = tuple[Target, int, int | None]  # with the layer, and the expert where each has tensors of its own


def read_parts(model: Decoder, folder: AdapterFolder) -> dict[str, Adapter]:
    """The modules of an adapter by their places' paths, laid out like the model.

    Raises:
        ConfigError: lists the tensors that are not this model's, that have another shape, or that are missing.
    """
    pieces, unexpected = _sorted(model, folder)
    missing, wrong = _misfits(model, folder.config, pieces)
    problems = [
        f"{kind}: {', '.join(sorted(names)[:SHOWN])}{f' and {len(names) - SHOWN} more' * (len(names) > SHOWN)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape or rank", wrong))
        if names
    ]
    if problems or not pieces:
        kind = model.config.hf.get("model_type", "given")
        raise ConfigError(
            f"{folder.source}: the adapter does not fit this {kind} model; {'; '.join(problems) or 'it is empty'}"
        )
    places: dict[Target, list[Place]] = defaultdict(list)
    for place in pieces:
        places[place[0]].append(place)
    parts: dict[str, Adapter] = {}
    for target, held in places.items():
        first = pieces[held[0]]
        if "whole" in first:
            tensor = first["whole"].tensor
            kernel = np.array(tensor if target.place == "embed.adapter" else tensor.T, np.float32)
            parts[target.place] = Copy(_put(model, target, {"kernel": kernel})["kernel"])
        else:
            parts[target.place] = _lora(model, folder.config, target, {place: pieces[place] for place in held})
    return parts


def _sorted(model: Decoder, folder: AdapterFolder) -> tuple[dict[Place, Pieces], list[str]]:
    """The tensors by the places that they are for, and the names of those that are for none."""
    modules = modules_of(targets_of(model.config, model.head_kind), folder.config.target_parameters or ())
    num_experts = model.config.experts.num_experts if model.config.experts else 1
    pieces: dict[Place, Pieces] = defaultdict(dict)
    unexpected = []
    for name, tensor in folder.tensors.items():
        entry = read_name(name, modules)
        places = [] if entry is None else [(target, entry.layer, entry.expert) for target in entry.targets]
        if (
            entry is None
            or entry.layer >= model.config.num_layers
            or (entry.expert or 0) >= num_experts
            or (entry.kind in ("whole", "base") and entry.targets[0].is_stacked)
            or any(entry.kind in pieces[place] for place in places)
        ):
            unexpected.append(name)
            continue
        if not np.isfinite(tensor).all():
            raise ConfigError(f"{folder.source}: {name} holds NaN or infinity; take another checkpoint of this adapter")
        for place in places:
            pieces[place][entry.kind] = Named(name, tensor)
    return {place: held for place, held in pieces.items() if held}, unexpected


def _misfits(model: Decoder, config: LoraConfig, pieces: dict[Place, Pieces]) -> tuple[set[str], set[str]]:
    """Names of tensors that should be there, and of those that have another shape or rank than they should."""
    missing, wrong = set(), set()
    targets = targets_of(model.config, model.head_kind)
    shapes = {target: shape_of(model, target)[-2:] for target in targets}
    whole = {target for (target, _, _), held in pieces.items() if "whole" in held}
    for target in targets:
        listed = target.name.rpartition(".")[2] in (config.modules_to_save or ())
        if listed and not target.is_stacked and target not in whole:
            missing.add(f"{target.name}.weight")
    for (target, layer, expert), held in pieces.items():
        sizes = (
            [shapes[target][1]]
            if expert is not None
            else [other.part.stop if other.part else shapes[other][1] for other in targets if other.name == target.name]
        )
        name = target.name.format(layer) if expert is None else target.alias.format(layer, expert)
        expected = _expected(model, target, expert, config.rank_of(name), shapes[target][0], max(sizes))
        thin = {"a", "b", "magnitude"} if config.use_dora else {"a", "b"}
        needed = {"whole"} if target in whole else thin
        missing |= {f"{kind} of {name}" for kind in needed - held.keys()}
        for kind, (tensor_name, tensor) in held.items():
            if kind not in needed | {"base"}:
                wrong.add(f"{tensor_name}, which adapter_config.json does not tell of")
            elif tensor.shape != expected[kind]:
                wrong.add(f"{tensor_name} {list(tensor.shape)} instead of {list(expected[kind])}")
            elif kind == "base" and not _is_base(model, target, tensor):
                wrong.add(f"{tensor_name}, whose values are not this model's")
    return missing, wrong


def _expected(
    model: Decoder, target: Target, expert: int | None, rank: int, num_inputs: int, num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a module of PEFT's, by kind."""
    together = target.is_expert and expert is None and model.config.experts
    rows = rank * (together.num_experts if together else 1)
    inner = (num_inputs, num_outputs) if target.place == "embed.adapter" else (num_outputs, num_inputs)
    return {
        "a": (rows, num_inputs),
        "b": (num_outputs, rows),
        "magnitude": (num_outputs,),
        **dict.fromkeys(("base", "whole"), inner),
    }


def _is_base(model: Decoder, target: Target, tensor: np.ndarray) -> bool:
    """Whether a tensor of the base that PEFT stored with the adapter is this model's, to rounding."""
    kernel = kernel_of(model, target)
    assert isinstance(kernel, nnx.Param)
    ours = on_host(kernel[...])
    ours = ours if target.path == "embed" else ours.T
    return np.allclose(ours.astype(np.float32), tensor.astype(np.float32), rtol=COARSE, atol=1e-6)


def _lora(model: Decoder, config: LoraConfig, target: Target, held: dict[Place, Pieces]) -> LoRA:
    """The module of a place from its tensors, layer by layer and, if they are apart, expert by expert."""
    check_place(model, config, target)
    names = [target.name.format(layer) for layer in range(model.config.num_layers if target.is_stacked else 1)]
    ranks, alphas = [0] * len(names), [1.0] * len(names)
    for _, layer, expert in held:
        name = names[layer] if expert is None else target.alias.format(layer, expert)
        ranks[layer], alphas[layer] = config.rank_of(name), config.alpha_of(name)
    choice = Choice(target, tuple(ranks), tuple(alphas))
    *stack, num_inputs, num_outputs = shape_of(model, target)
    a = np.zeros((*stack, num_inputs, max(ranks)), np.float32)
    b = np.zeros((*stack, max(ranks), num_outputs), np.float32)
    magnitude = np.ones((*stack, num_outputs), np.float32)
    for (_, layer, expert), pieces in held.items():
        at = (*([layer] if target.is_stacked else []), *([] if expert is None else [expert]))
        outputs = slice(None) if target.part is None or expert is not None else slice(*target.part)
        part = from_peft(pieces["a"].tensor, pieces["b"].tensor, a[at].shape[0] if a[at].ndim == 3 else None)
        a[at][..., : ranks[layer]] = part[0]
        b[at][..., : ranks[layer], :] = part[1][..., outputs]
        if config.use_dora:
            magnitude[at] = pieces["magnitude"].tensor[outputs]
    read = {"lora_a": a, "lora_b": b, "scale": np.asarray(scales(config, choice))}
    arrays = _put(model, target, read | ({"magnitude": magnitude} if config.use_dora else {}))
    if config.init_lora_weights in SUBTRACTED:
        new = new_arrays(model, config, choice, jax.random.key(0))
        arrays |= {name: array for name, array in new.items() if name.startswith("initial_")}
    return LoRA(arrays, choice.ranks, 0 if target.is_expert else config.lora_dropout)  # as PEFT trains them


def _put(model: Decoder, target: Target, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
    """Arrays on the model's mesh, laid out as the sharding table has them."""
    mesh = mesh_of(model)
    if mesh is None:
        return {name: jnp.asarray(array) for name, array in arrays.items()}
    places = layout(target.place, arrays, mesh)

    def put(name: str, array: np.ndarray) -> Array:
        return jax.make_array_from_callback(array.shape, places[name], lambda index: array[index])

    return {name: put(name, array) for name, array in arrays.items()}
