"""Adapters in PEFT's format, in and out; what is written here is what PEFT 0.21 reads beside transformers 5."""

import json
import math
import os
import re
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxpost.errors import ConfigError
from jaxpost.models.adapters import active_config, active_parts, install
from jaxpost.models.lora import Copy, LoRA
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.lora_init import SUBTRACTED, shape_of
from jaxpost.models.lora_targets import Target, is_all_linear, is_end, shortest_names, targets_of
from jaxpost.models.peft_folder import PREFIX, AdapterFolder, open_adapter
from jaxpost.models.peft_read import read_parts
from jaxpost.models.peft_tensors import Part, fused, module_name, on_host, to_peft
from jaxpost.models.publish import ADAPTER_CONFIG, ADAPTER_WEIGHTS, replacing
from jaxpost.models.resize import resize_embeddings
from jaxpost.models.transformer import Decoder

EMBEDDING = "model.embed_tokens.weight"
TASKS = {"lm": "CAUSAL_LM", "reward": "SEQ_CLS"}


def load_adapter(
    model: Decoder, path: str | os.PathLike[str], name: str = "default", *, revision: str | None = None
) -> Decoder:
    """Give a model the adapter in a folder or a hub repository, in place, and use it.

    Args:
        model: the base, or one with other adapters, which are kept.
        path: where the adapter is.
        name: to switch between several; see `set_adapter`.
        revision: branch, tag or commit of a hub repository.

    Returns:
        The same model. If the adapter holds an embedding with more rows, it has grown to them.

    Raises:
        ConfigError: there is no adapter, it is for another model, or it asks for what is not supported.
    """
    folder = open_adapter(path, revision)
    if folder is None:
        raise ConfigError(f"{path} holds a model, not an adapter; give a folder with {ADAPTER_CONFIG}")
    return hang(model, folder, name)


def hang(model: Decoder, folder: AdapterFolder, name: str = "default") -> Decoder:
    """`load_adapter` of an opened folder."""
    if folder.config.task_type == TASKS["reward"] and model.head_kind == "lm":
        raise ConfigError(f'{folder.source} is the adapter of a reward model; load it with head="reward"')
    rows, *others = folder.tensors[EMBEDDING].shape if EMBEDDING in folder.tensors else (0,)
    if rows > model.config.vocab_size and others == [model.config.embed_dim]:
        resize_embeddings(model, rows)
    return install(model, name, folder.config, read_parts(model, folder))


def save_adapter(
    model: Decoder,
    path: str | os.PathLike[str],
    base_model_name: str,
    *,
    revision: str | None = None,
    tokenizer: Any = None,
) -> None:
    """Write the adapter in use as a folder that PEFT loads; it appears as a whole or not at all.

    An adapter that began with a part of the base (PiSSA, OLoRA) is written as a plain one of twice the rank, which
    computes the same on the original base. Every process must call this; the first one writes.

    Args:
        model: a decoder with an adapter.
        path: the folder.
        base_model_name: where others find the base: a hub id or a path.
        revision: of the base.
        tokenizer: a transformers tokenizer to write beside it, or None.

    Raises:
        ConfigError: the model has no adapter; `path` is a file.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    config, target = active_config(model), Path(os.path.realpath(os.path.expanduser(path)))
    if config is None:
        raise ConfigError("the model has no adapter to save; use save_pretrained for the whole model")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; give a folder to save the adapter in")
    modules, whole = _modules(model)
    leaves = {module.target.name.rpartition(".")[2] for module in modules if module.target.is_parameter}
    tensors = {PREFIX + name: tensor for module in modules for name, tensor in module.tensors(leaves).items()}
    tensors |= {f"{PREFIX}{target.name}.weight": kernel for target, kernel in whole.items()}
    contents = {
        **_fields(model, config, modules, list(whole)),
        "base_model_name_or_path": base_model_name,
        "revision": revision or (config.revision if base_model_name == config.base_model_name_or_path else None),
    }
    if jax.process_index() != 0:
        return
    with replacing(target) as folder:
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


class Module(NamedTuple):
    """What is written for one module of HF's in one layer.

    Attributes:
        target: one of our places that it is.
        layer: 0 where there are none.
        part: A, B and magnitude, those of several places fused.
        scale: what their product is multiplied with.
    """

    target: Target
    layer: int
    part: Part
    scale: float

    @property
    def name(self) -> str:
        """In HF's model."""
        return self.target.name.format(self.layer)

    @property
    def rank(self) -> int:
        return self.part.a.shape[-1]

    def tensors(self, leaves: set[str]) -> dict[str, np.ndarray]:
        """PEFT's tensors, by name; `leaves` are the last names of all parameters that the adapter is for."""
        module = module_name(self.target, leaves).format(self.layer)
        is_embedding = self.target.place == "embed.adapter"
        ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        named = dict(zip([f"{module}.{end}" for end in ends], to_peft(self.part.a, self.part.b), strict=True))
        if self.part.magnitude is not None:
            named[f"{module}.lora_magnitude_vector"] = self.part.magnitude
        return named


def _modules(model: Decoder) -> tuple[list[Module], dict[Target, np.ndarray]]:
    """All that hangs on the model, in HF's modules; and the modules that are trained as a whole, in HF's layout."""
    parts, whole = active_parts(model), {}
    held: dict[tuple[str, int], dict[Target, tuple[Part, float]]] = defaultdict(dict)
    targets = targets_of(model.config, model.head_kind)
    for target in targets:
        part = parts.get(target.place)
        if isinstance(part, Copy):
            kernel = on_host(part.kernel[...])
            whole[target] = kernel if target.place == "embed.adapter" else kernel.T
        elif part is not None:
            for layer, piece in _layers(target, part).items():
                held[target.name, layer][target] = piece
    modules = []
    for (name, layer), pieces in held.items():
        siblings = [target for target in targets if target.name == name]
        outputs = max(target.part.stop if target.part else shape_of(model, target)[-1] for target in siblings)
        together = fused({target: part for target, (part, _) in pieces.items()}, outputs)
        modules.append(Module(siblings[0], layer, together, next(iter(pieces.values()))[1]))
    return modules, whole


def _layers(target: Target, part: LoRA) -> dict[int, tuple[Part, float]]:
    """What hangs at a place in each layer, and its scale."""
    variables = part.lora_a, part.lora_b, part.scale, part.magnitude, part.initial_a, part.initial_b
    a, b, scale, magnitude, a0, b0 = (None if each is None else on_host(each[...]) for each in variables)
    assert a is not None and b is not None and scale is not None
    layers = {}
    for layer, rank in enumerate(part.ranks):
        if rank:
            at = layer if target.is_stacked else ()
            thin_a, thin_b = a[at][..., :rank], b[at][..., :rank, :]
            if a0 is not None and b0 is not None:
                thin_a = np.concatenate([thin_a, a0[at][..., :rank]], axis=-1)
                thin_b = np.concatenate([thin_b, -b0[at][..., :rank, :]], axis=-2)
            layers[layer] = Part(thin_a, thin_b, None if magnitude is None else magnitude[at]), float(scale[at])
    return layers


def _fields(model: Decoder, config: LoraConfig, modules: list[Module], whole: list[Target]) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    if config.init_lora_weights in SUBTRACTED:
        config = _doubled(config)
    config = replace(config, **_targets(model, config, modules))
    fits = all(
        config.rank_of(module.name) == module.rank
        and math.isclose(config.scale(module.rank, config.alpha_of(module.name)), module.scale, rel_tol=1e-6)
        for module in modules
    )
    if not fits:
        config = replace(config, **_patterns(config, modules))
    saved = {target.name.rpartition(".")[2] for target in whole}
    if saved - set(config.modules_to_save or ()):
        config = replace(config, modules_to_save=saved | set(config.modules_to_save or ()))
    own = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in ("others", "source")}
    return {
        **config.others,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        "peft_type": "LORA",
        "task_type": TASKS["reward"] if model.head_kind == "reward" else config.task_type or TASKS["lm"],
        "inference_mode": True,
    }


def _doubled(config: LoraConfig) -> LoraConfig:
    """For an adapter of twice the rank with the same scale, which is taken as it is when it is loaded."""
    more = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: more * alpha for pattern, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def _targets(model: Decoder, config: LoraConfig, modules: list[Module]) -> dict[str, Any]:
    """The fields that say what is targeted: as given, or spelled out where PEFT would take them otherwise."""
    targets = targets_of(model.config, model.head_kind)
    chosen = {module.target.name for module in modules if module.target.is_parameter}
    given = {
        target.name
        for target in targets
        if target.is_parameter and any(is_end(end, target.name) for end in config.target_parameters or ())
    }
    with_layers = isinstance(config.target_modules, str) and config.layers_to_transform
    if config.target_modules is not None and not is_all_linear(config) and not with_layers and chosen == given:
        return {}
    layers = config.layers_to_transform or range(model.config.num_layers)
    existing = {target.name.format(layer) for target in targets for layer in layers if not target.is_parameter}
    names = {module.name for module in modules if not module.target.is_parameter}
    return {
        "target_modules": shortest_names(names, existing),
        "target_parameters": sorted(name.partition("{}.")[2] for name in chosen) or None,
        "exclude_modules": None,
    }


def _patterns(config: LoraConfig, modules: list[Module]) -> dict[str, dict[str, Any]]:
    """Ranks and alphas that differ from the config's: by the last name where that tells them, else by the path."""
    numbers: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    for module in modules:
        alpha = module.scale * (math.sqrt(module.rank) if config.use_rslora else module.rank)
        alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha
        numbers[module.name.rpartition(".")[2]][module.name] = module.rank, alpha
    ranks, alphas = {}, {}
    for end, by_name in numbers.items():
        same = len(set(by_name.values())) == 1
        for key, (rank, alpha) in {end: next(iter(by_name.values()))}.items() if same else by_name.items():
            if rank != config.r:
                ranks[re.escape(key)] = rank
            if alpha != config.lora_alpha:
                alphas[re.escape(key)] = alpha
    return {"rank_pattern": ranks, "alpha_pattern": alphas}
