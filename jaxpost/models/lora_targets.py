"""Which modules of a model an adapter hangs on, named as PEFT and transformers 5 name them."""

import re
from collections.abc import Callable
from typing import NamedTuple

from jaxpost.errors import ConfigError
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import LAYER, rows_of
from jaxpost.models.lora_config import ALL_LINEAR, LoraConfig
from jaxpost.models.rows import Part

EXPERTS, ROUTER = "layers.mlp.experts.", "layers.mlp.router"
HEAD_NAMES = {"lm": "lm_head", "reward": "score"}
EMBEDDING = "model.embed_tokens"
DEFAULT = ("layers.attention.query", "layers.attention.value")  # PEFT's for each family that it knows


class Target(NamedTuple):
    """A place for an adapter.

    Attributes:
        path: of our module, e.g. `layers.attention.query`.
        slot: its attribute that the adapter becomes.
        name: HF's module, or HF's parameter, e.g. `model.layers.{}.self_attn.q_proj`; `{}` stands for the layer.
        part: what of the outputs of HF's module is ours, where it fuses several; None for all.
        is_parameter: HF has no module of that name, but a parameter of its parent's, as of experts and routers.
        alias: the module that a parameter was in transformers 4; another `{}` stands for the expert.
    """

    path: str
    slot: str
    name: str
    part: Part | None = None
    is_parameter: bool = False
    alias: str = ""

    @property
    def place(self) -> str:
        """Where the adapter is in our model."""
        return f"{self.path}.{self.slot}"

    @property
    def is_stacked(self) -> bool:
        """Whether there is one in each layer."""
        return "{}" in self.name

    def names(self, layer: int) -> tuple[str, ...]:
        """What it is called in this layer: by HF now, and before."""
        return (self.name.format(layer), *([self.alias.format(layer, 0)] if self.alias else []))

    @property
    def is_expert(self) -> bool:
        """Whether there is one for each expert."""
        return self.path.startswith(EXPERTS)


class Choice(NamedTuple):
    """A place with what hangs there.

    Attributes:
        target: the place.
        ranks: of each layer, 0 where a layer is left out; one number where there are no layers.
        alphas: likewise.
    """

    target: Target
    ranks: tuple[int, ...]
    alphas: tuple[float | int, ...]


def targets_of(config: ModelConfig, head: str) -> list[Target]:
    """Every place of a model: its linear layers, its embedding and its head, which counts even where it is tied."""
    targets = []
    for row in rows_of(config, head):
        path, _, kind = row.path.rpartition(".")
        name = row.hf_name.removesuffix(".weight")
        if path.startswith(EXPERTS):
            assert config.experts is not None
            size = config.experts.mlp_dim
            parameter, part = {
                "gate": ("gate_up_proj", Part(0, size)),
                "up": ("gate_up_proj", Part(size, 2 * size)),
                "down": ("down_proj", None),
            }[path.removeprefix(EXPERTS)]
            targets.append(Target(path, "adapter", f"{LAYER}mlp.experts.{parameter}", part, True, name))
        elif path == ROUTER:
            targets.append(Target(path, "adapter", f"{LAYER}mlp.gate.weight", None, True, name))
        elif kind in ("kernel", "embedding"):
            targets.append(Target(path, "adapter", name, row.part))
    if head == "lm" and config.tie_embeddings:
        targets.append(Target("embed", "head_adapter", HEAD_NAMES[head]))
    return targets


def choose(lora: LoraConfig, config: ModelConfig, head: str) -> list[Choice]:
    """The places that a config asks for.

    Raises:
        ConfigError: a target, a module to save or a layer that the model does not have; or nothing is asked for.
    """
    targets, layers = targets_of(config, head), lora.layers_to_transform or range(config.num_layers)
    if max(layers) >= config.num_layers:
        raise ConfigError(f"layers_to_transform names layer {max(layers)}; the model has {config.num_layers}")
    _check_known(lora, targets, config)
    is_wanted, is_excluded = _wanted(lora, targets, head), _matcher(lora.exclude_modules)
    saved = {target.name for target in saved_targets(lora, config, head)}
    choices = []
    for target in targets:
        ranks, alphas = [], []
        for layer in range(config.num_layers if target.is_stacked else 1):
            names = target.names(layer)
            left_out = layer not in layers if target.is_stacked else lora.layers_to_transform is not None
            takes = is_wanted(target, names) and not (is_excluded(names) or target.name in saved or left_out)
            ranks.append(lora.rank_of(names[0]) if takes else 0)
            alphas.append(lora.alpha_of(names[0]))
        if any(ranks):
            choices.append(Choice(target, tuple(ranks), tuple(alphas)))
    if not choices and not saved:
        raise ConfigError("the adapter has no module: all that is targeted is excluded")
    return choices


def saved_targets(lora: LoraConfig, config: ModelConfig, head: str) -> list[Target]:
    """The places of modules that are trained as a whole; the new head of a reward model always is one.

    Raises:
        ConfigError: the model has no such module, or it is one of the blocks.
    """
    whole = {target.name: target for target in targets_of(config, head) if not target.is_stacked}
    found = {}
    for wanted in [*(lora.modules_to_save or ()), *(["score"] if head == "reward" else [])]:
        names = [name for name in whole if is_end(wanted, name)]
        if not names and (wanted, head) != ("classifier", "reward"):  # what PEFT lists besides, whatever the model
            raise ConfigError(
                f"modules_to_save: {wanted!r:.80} cannot be trained as a whole; "
                f"this model has {', '.join(name.rpartition('.')[2] for name in whole)}"
            )
        found |= {name: whole[name] for name in names}
    return list(found.values())


def shortest_names(chosen: set[str], existing: set[str]) -> list[str]:
    """Ends of paths that fit the chosen ones of the existing modules and no others: `q_proj`, or the whole path."""
    names = set()
    for name in chosen:
        end = name.rpartition(".")[2]
        names.add(end if all(other in chosen for other in existing if is_end(end, other)) else name)
    return sorted(names)


def _wanted(lora: LoraConfig, targets: list[Target], head: str) -> Callable[[Target, tuple[str, ...]], bool]:
    """Whether the config asks for a place, by its names."""
    if lora.target_modules is None and lora.target_parameters is None:
        default = {target.name for target in targets if target.path in DEFAULT}
        return lambda target, names: target.name in default
    if is_all_linear(lora):
        return lambda target, names: target.name not in (EMBEDDING, HEAD_NAMES[head])
    is_module, is_parameter = _matcher(lora.target_modules), _matcher(lora.target_parameters)
    return lambda target, names: (
        is_module(names[target.is_parameter :]) or (target.is_parameter and is_parameter(names[:1]))
    )


def is_all_linear(lora: LoraConfig) -> bool:
    """Whether every linear layer but the head is targeted."""
    return isinstance(lora.target_modules, str) and lora.target_modules.lower() == ALL_LINEAR


def _matcher(given: str | tuple[str, ...] | None) -> Callable[[tuple[str, ...]], bool]:
    """Whether one of some names is given: as a path's end in a list, or by a regular expression for the whole path."""
    if isinstance(given, str):
        expression = _compiled(given)
        return lambda names: any(expression.fullmatch(name) for name in names)
    return lambda names: any(is_end(end, name) for end in given or () for name in names)


def _compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{expression!r:.80} is no regular expression ({error})") from error


def is_end(end: str, name: str) -> bool:
    """Whether a path is, or ends with, these names."""
    return name == end or name.endswith(f".{end}")


def _check_known(lora: LoraConfig, targets: list[Target], config: ModelConfig) -> None:
    """Raise ConfigError for a target that no module and no parameter of the model matches."""
    places = [(target, target.names(layer)) for target in targets for layer in range(config.num_layers)]
    modules = [name for target, names in places for name in names[target.is_parameter :]]
    parameters = [names[0] for target, names in places if target.is_parameter]
    for field, existing in (("target_modules", modules), ("target_parameters", parameters)):
        given = getattr(lora, field) if not (field == "target_modules" and is_all_linear(lora)) else None
        for each in (given,) if isinstance(given, str) else given or ():
            matches = _matcher(given if isinstance(given, str) else (each,))
            if not any(matches((name,)) for name in existing):
                known = sorted({name.rpartition(".")[2] for name in existing})
                raise ConfigError(f"{field}: nothing in the model matches {each!r:.80}; it has {', '.join(known)}")
