"""How an adapter is made: with PEFT's names as an object, with TRL's names as flags."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from jaxpost.errors import ConfigError
from jaxpost.options import Group, check_choices, nearest, one_of, option

ALL_LINEAR = "all-linear"
INITS = ("default", "gaussian", "pissa", "olora")
MOST_PATTERNS, MOST_REPEATS = 1024, 3
# Fields of PEFT's that change nothing of an adapter that is there, or only how PEFT goes about it.
IRRELEVANT = frozenset(
    [
        *("auto_mapping", "peft_version", "inference_mode", "runtime_config", "fan_in_fan_out"),
        *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    ]
)
# What the other fields must be; those of lists say more themselves.
TYPES: dict[str, Any] = {
    **dict.fromkeys(["r"], int),
    **dict.fromkeys(["lora_alpha", "lora_dropout"], int | float),
    **dict.fromkeys(["use_rslora", "use_dora"], bool),
    **dict.fromkeys(["bias", "task_type", "base_model_name_or_path", "revision"], str),
    **dict.fromkeys(["rank_pattern", "alpha_pattern"], Mapping),
    "init_lora_weights": bool | str,
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter; names, defaults and meaning are those of `peft.LoraConfig`.

    Modules are named as in transformers: a list holds ends of their paths (`q_proj`, `mlp.down_proj`), a string is a
    regular expression for the whole path, or `all-linear`.

    Attributes:
        r: rank.
        lora_alpha: the adapter's output is multiplied with alpha / r, or alpha / sqrt(r) if `use_rslora`.
        lora_dropout: share of the inputs that is dropped in training.
        target_modules: which modules get an adapter; by default those of the queries and the values.
        exclude_modules: which do not.
        target_parameters: parameters that are no module's in transformers, such as `mlp.experts.down_proj`.
        modules_to_save: modules that are trained as a whole: `embed_tokens`, `lm_head`, `score`.
        use_rslora, use_dora: see `models.lora`.
        init_lora_weights: True, `gaussian`, `pissa` (Meng et al., 2024, arXiv:2404.02948) or `olora` (Büyükakyüz,
            2024, arXiv:2406.01775).
        layers_to_transform: indices of the layers that get an adapter; by default all.
        layers_pattern: what the list of layers is called; it is `layers`.
        rank_pattern, alpha_pattern: ranks and alphas of modules whose paths' ends match a regular expression.
        bias: `none`; biases are not trained.
        task_type, base_model_name_or_path, revision: what `adapter_config.json` says of the base.
        others: fields that change nothing, to be written back.
        source: what to call it in errors.

    Raises:
        ConfigError: a value that makes no sense.
    """

    r: int = 8
    lora_alpha: float | int = 8
    lora_dropout: float | int = 0.0
    target_modules: Any = None
    exclude_modules: Any = None
    target_parameters: Any = None
    modules_to_save: Any = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Mapping[str, Any] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict, hash=False)
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: str = field(default="LoraConfig", compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check("r", _whole(self.r), "a positive whole number")
        self._check("lora_alpha", _positive(self.lora_alpha), "a positive number")
        dropout = self.lora_dropout
        self._check("lora_dropout", _number(dropout) and 0 <= dropout < 1, "a number from 0 to below 1")
        for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            self._check(name, value is None or isinstance(value, str) or _texts(value), "a text or a list of texts")
            object.__setattr__(self, name, _listed(value))
        self._check("target_parameters", not isinstance(self.target_parameters, str), "a list of texts")
        object.__setattr__(self, "layers_to_transform", _listed(self.layers_to_transform) or None)
        indices = self.layers_to_transform or ()
        whole = isinstance(indices, tuple) and all(_whole(index, least=0) for index in indices)
        self._check("layers_to_transform", whole, "indices of layers")
        self._check("layers_pattern", self.layers_pattern in (None, (), "", "layers", ("layers",)), "layers")
        self._check("bias", self.bias == "none", "none: biases are not trained")
        for name, allowed in (("rank_pattern", _whole), ("alpha_pattern", _positive)):
            patterns = getattr(self, name)
            fits = isinstance(patterns, Mapping) and len(patterns) <= MOST_PATTERNS and all(map(_quick, patterns))
            self._check(name, fits, f"up to {MOST_PATTERNS} regular expressions of up to {MOST_REPEATS} repeats each")
            self._check(name, all(map(allowed, patterns.values())), "positive numbers")
            object.__setattr__(self, name, dict(patterns))

    def _check(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise ConfigError(f"{self.source}: {name} is {getattr(self, name)!r:.80}; it takes {wanted}")

    @property
    def init(self) -> str:
        """How a new adapter starts, one of INITS.

        Raises:
            ConfigError: in a way that is not supported.
        """
        init = self.init_lora_weights
        return "default" if init is True else one_of("init_lora_weights", str(init), INITS)

    def scale(self, rank: int, alpha: float | int) -> float:
        """What an adapter's output is multiplied with."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its path in transformers."""
        return _matching(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float | int:
        """The alpha of a module, by its path in transformers."""
        return _matching(self.alpha_pattern, module, self.lora_alpha)


@dataclass(frozen=True, kw_only=True)
class LoRAArguments:
    """Whether and how a run trains an adapter."""

    help_group = Group.ADAPTER

    use_peft: bool = option(False, "Train a low-rank adapter (LoRA) instead of the whole model.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "The adapter's output is multiplied with alpha / r.")
    lora_dropout: float = option(0.05, "Share of the adapter's inputs that is dropped in training.")
    lora_target_modules: list[str] | None = option(
        None, "Modules with an adapter: q_proj v_proj ..., a regular expression or all-linear; default q_proj v_proj."
    )
    lora_modules_to_save: list[str] | None = option(
        None, "Modules to train as a whole beside the adapter: embed_tokens, lm_head."
    )
    lora_layers_to_transform: list[int] | None = option(None, "Layers with an adapter, by index; all by default.")
    use_rslora: bool = option(False, "Multiply with alpha / sqrt(r) (rank-stabilized LoRA).")
    use_dora: bool = option(False, "Train magnitude and direction of the weights apart (DoRA).")
    lora_init: str = option("default", "How the adapter starts: default, gaussian, pissa or olora.", choices=INITS)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.use_peft:
            self.lora_config()

    @property
    def idle(self) -> list[str]:
        """Names of the flags that are set and say nothing, as no new adapter is asked for."""
        flags = [flag for flag in fields(LoRAArguments) if not self.use_peft]
        return [flag.name for flag in flags if getattr(self, flag.name) != flag.default]

    def lora_config(self) -> LoraConfig:
        """These flags as an object. A single target that is no plain name is a regular expression or `all-linear`."""
        targets: Any = self.lora_target_modules
        if targets and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
            targets = targets[0]
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            modules_to_save=self.lora_modules_to_save,
            layers_to_transform=self.lora_layers_to_transform,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.lora_init == "default" else self.lora_init,
        )


@runtime_checkable
class PeftConfig(Protocol):
    """What is needed of a config of PEFT's."""

    def to_dict(self) -> dict[str, Any]: ...


def as_lora_config(config: LoraConfig | PeftConfig) -> LoraConfig:
    """Ours, or a `peft.LoraConfig` as ours.

    Raises:
        ConfigError: another kind of config, or one that asks for what is not supported; the field is named.
    """
    if isinstance(config, LoraConfig):
        return config
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"peft_config is a {type(config).__name__}; it takes a LoraConfig of jaxpost's or of PEFT's")
    return read_lora_config(config.to_dict(), "peft_config")


def read_lora_config(given: Mapping[str, Any], source: str) -> LoraConfig:
    """From PEFT's fields.

    Args:
        given: the contents of adapter_config.json, or of a config's `to_dict`.
        source: what to call it in errors.

    Raises:
        ConfigError: another kind of adapter, or a field that would change it and that is not supported.
    """
    kind = str(given.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise ConfigError(f"{source}: peft_type {kind[:80]!r} is not supported; only LORA is")
    known = {each.name for each in fields(LoraConfig)} - {"others", "source"}
    unsupported = [
        f"{name} = {value!r:.80}{nearest(name, known)}"
        for name, value in given.items()
        if name not in known | IRRELEVANT | {"peft_type"} and value not in (None, False, {}, [], ())
    ]
    if unsupported:
        raise ConfigError(f"{source}: jaxpost does not support {'; '.join(sorted(unsupported)[:3])}")
    values = {name: value for name, value in given.items() if name in known and value is not None}
    for name, value in values.items():
        if not isinstance(value, TYPES.get(name, object)):
            raise ConfigError(f"{source}: {name} is {value!r:.80}, which is of the wrong type")
    others = {name: value for name, value in given.items() if name not in known}
    return LoraConfig(**values, others=others, source=source)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(item, str) for item in value)


def _listed(value: Any) -> Any:
    """A list as a tuple, which can be hashed; a set sorted, so that two equal ones are alike."""
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))
    return tuple(value) if isinstance(value, list | tuple) else (value,) if type(value) is int else value


def _quick(pattern: Any) -> bool:
    """Whether this is a regular expression that is soon compared: a config may come from anyone."""
    if not isinstance(pattern, str) or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return len(re.findall(r"[*+{]", pattern)) <= MOST_REPEATS


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole path or its end after a dot, as PEFT takes it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
