"""Takes fields out of a `config.json`, with their checks, and knows what was left unread."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from jaxpost.errors import ConfigError
from jaxpost.models.config import Rotary
from jaxpost.models.rotary import KINDS

T = TypeVar("T", int, float, bool, str, list, dict)

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096

# The same fields, as different versions of transformers write them.
RENAMED = {"num_local_experts": "num_experts", "_sliding_window_pattern": "sliding_window_pattern"}

FULL, SLIDING = "full_attention", "sliding_attention"

# Fields that say nothing about the mathematics: bookkeeping, tokens, generation, initialisation, and dropout, which
# jaxpost does not apply (nor does TRL while it trains on preferences or rewards). Remote code is never imported.
IRRELEVANT = frozenset(
    [
        *("_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "auto_map"),
        *("bos_token_id", "cache_implementation", "dtype", "embd_pdrop", "eos_token_id", "id2label"),
        *("initializer_range", "is_llama_config", "label2id", "model_type", "name_or_path", "num_labels"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp"),
        *("problem_type", "resid_pdrop", "return_dict", "rope_interleaved", "torch_dtype", "transformers.js_config"),
        *("transformers_version", "unsloth_fixed", "unsloth_version", "use_cache"),
    ]
)


class ConfigReader:
    """The fields of one `config.json`; what it leaves out has the defaults of transformers' config class.

    Args:
        fields: the JSON object.
        source: what to call it in errors, e.g. its path.
        defaults: of the fields that may be left out.
    """

    def __init__(self, fields: Mapping[str, Any], source: str, defaults: Mapping[str, Any]):
        self.source = source
        given = {RENAMED.get(name, name): value for name, value in fields.items()}
        for old, new in RENAMED.items():
            if fields.get(new, given.get(new)) != given.get(new):
                raise self.error(f"config.json gives {old} and {new}, which mean the same, different values")
        self.fields = {**defaults, **given}
        self.given = {name: value for name, value in given.items() if value is not None}
        self.taken: set[str] = set()

    def error(self, problem: str) -> ConfigError:
        """What is wrong with this file, ready to be raised."""
        return ConfigError(f"{self.source}: {problem}")

    def optional(self, name: str, kind: type[T]) -> T | None:
        """The field's value, None where it is null or left out.

        Raises:
            ConfigError: it is of another type.
        """
        self.taken.add(name)
        value = self.fields.get(name)
        if value is None:
            return None
        if not _fits(value, kind):
            raise self.error(f"config.json has {name} = {value!r:.80}, expected {kind.__name__}")
        return value

    def take(self, name: str, kind: type[T]) -> T:
        """The field's value, which must be there."""
        value = self.optional(name, kind)
        if value is None:
            raise self.error(f"config.json lacks {name!r}")
        return value

    def size(self, name: str, limit: int = MAX_SIZE) -> int:
        """A whole number from 1 to `limit`."""
        value = self.take(name, int)
        if not 1 <= value <= limit:
            raise self.error(f"config.json has {name} = {value}, expected a whole number from 1 to {limit}")
        return value

    def optional_size(self, name: str) -> int | None:
        """A positive whole number, or None."""
        return None if self.optional(name, int) is None else self.size(name)

    def positive(self, name: str) -> float:
        """A finite number above zero."""
        value = float(self.take(name, float))
        if not 0 < value < math.inf:
            raise self.error(f"config.json has {name} = {value}, expected a positive number")
        return value

    def optional_positive(self, name: str) -> float | None:
        """A finite number above zero, or None."""
        return None if self.optional(name, float) is None else self.positive(name)

    def fixed(self, name: str, *values: Any) -> None:
        """Only these values (or none at all) are supported.

        Raises:
            ConfigError: another one.
        """
        self.taken.add(name)
        value = self.fields.get(name)
        if value is not None and value not in values:
            raise self.error(f"config.json has {name} = {value!r:.80}, which is not supported")

    def ignore(self, *names: str) -> None:
        """Fields that transformers does not use for this family either."""
        self.taken.update(names)

    def close(self) -> None:
        """Refuse a field that nothing read: it may change the mathematics."""
        unread = sorted(set(self.given) - self.taken - IRRELEVANT)
        if unread:
            listed = ", ".join(f"{name:.40} = {self.given[name]!r:.40}" for name in unread[:5])
            raise self.error(
                f"config.json has {listed}, which jaxpost does not know for this family; "
                "remove it if it does not change the model"
            )


def _fits(value: Any, kind: type) -> bool:
    """JSON's true is no number, and 1 is a float too."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def read_windows(reader: ConfigReader, window: int | None, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Each layer's window, by `layer_types` or, where config.json leaves it out, by the family's rule."""
    layers = reader.size("num_hidden_layers", MAX_LAYERS)
    kinds = reader.optional("layer_types", list)
    if kinds is None:
        return tuple(window if slides(layer) else None for layer in range(layers))
    if len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise reader.error(f"layer_types must name {layers} layers, each {FULL} or {SLIDING}")
    if SLIDING in kinds and window is None:
        raise reader.error("layer_types has sliding layers, but there is no sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def read_rotary(
    reader: ConfigReader,
    head_dim: int,
    *,
    theta: str = "rope_theta",
    part: str = "",
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Rotary:
    """Rotary settings from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    Args:
        reader: of config.json.
        head_dim: dimensions of a head.
        theta: the field that holds the base where the settings do not.
        part: key of the settings in `rope_parameters`, where these differ by kind of layer.
        aliases: other names of rotary types.
    """
    settings = reader.optional("rope_parameters", dict) or {}
    if part:
        if set(settings) - {FULL, SLIDING}:
            raise reader.error(f"rope_parameters must hold the settings of {FULL} and {SLIDING}")
        settings = settings.get(part) or {}
    if part != SLIDING:
        settings = reader.optional("rope_scaling", dict) or settings
    if not isinstance(settings, dict):
        raise reader.error("rope_parameters must be an object")
    top = {"rope_theta": reader.take(theta, float), "partial_rotary_factor": reader.fields["partial_rotary_factor"]}
    inner = ConfigReader(settings, f"{reader.source}: rope_parameters", {"rope_type": settings.get("type"), **top})
    kind = inner.optional("rope_type", str) or "default"
    kind = aliases.get(kind, kind)
    inner.ignore("type")
    if kind not in KINDS:
        raise reader.error(f"rotary type {kind!r} is not supported; known: {', '.join(KINDS)}")
    dim = int(head_dim * inner.positive("partial_rotary_factor"))
    if dim % 2 or not 0 < dim <= head_dim:
        raise reader.error(f"rotary embedding of {dim} of {head_dim} head dimensions; it must be even and fit")
    shape = _SHAPES[kind](inner, reader, dim) if kind in _SHAPES else {}
    rotary = Rotary(dim=dim, theta=inner.positive("rope_theta"), kind=kind, **shape)
    inner.close()
    return rotary


def _linear(inner: ConfigReader, reader: ConfigReader, dim: int) -> dict[str, Any]:
    return {"factor": inner.positive("factor")}


def _dynamic(inner: ConfigReader, reader: ConfigReader, dim: int) -> dict[str, Any]:
    if dim < 4:
        raise reader.error(f"dynamic rotary embedding of {dim} head dimensions; it needs at least 4")
    return {"factor": inner.positive("factor"), "original_max_positions": reader.size("max_position_embeddings")}


def _llama3(inner: ConfigReader, reader: ConfigReader, dim: int) -> dict[str, Any]:
    return {
        "factor": inner.positive("factor"),
        "low_freq_factor": inner.positive("low_freq_factor"),
        "high_freq_factor": inner.positive("high_freq_factor"),
        "original_max_positions": _original(inner, reader),
    }


def _yarn(inner: ConfigReader, reader: ConfigReader, dim: int) -> dict[str, Any]:
    factor, original = _factor(inner, reader), _original(inner, reader)
    attention = inner.optional_positive("attention_factor")
    mscale, mscale_all_dim = inner.optional("mscale", float), inner.optional("mscale_all_dim", float)
    if attention is None:
        attention = _mscale(factor, 1.0)
        if mscale and mscale_all_dim:
            attention = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return {
        "factor": factor,
        "original_max_positions": original,
        "attention_factor": attention,
        "beta_fast": inner.optional_positive("beta_fast") or 32.0,
        "beta_slow": inner.optional_positive("beta_slow") or 1.0,
        "truncate": inner.optional("truncate", bool) is not False,
    }


def _longrope(inner: ConfigReader, reader: ConfigReader, dim: int) -> dict[str, Any]:
    factor, original = _factor(inner, reader), _original(inner, reader)
    attention = inner.optional_positive("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = {}
    for name in ("short_factor", "long_factor"):
        values = inner.take(name, list)
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
        if len(values) != dim // 2 or not numbers:
            raise reader.error(f"{name} must be a list of {dim // 2} positive numbers")
        divisors[f"{name}s"] = tuple(float(value) for value in values)
    return {"factor": factor, "original_max_positions": original, "attention_factor": attention, **divisors}


def _mscale(factor: float, scale: float) -> float:
    """YaRN's temperature (Peng et al., 2023, arXiv:2309.00071, equation 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(inner: ConfigReader, reader: ConfigReader) -> int:
    """Longest text of the first training: a field of its own, one of the settings, or what the model takes today."""
    places = ((reader, "original_max_position_embeddings"), (inner, "original_max_position_embeddings"))
    found = [place.optional_size(name) for place, name in places]
    original = found[0] or found[1] or reader.size("max_position_embeddings")
    if original < 2:
        raise reader.error(f"original_max_position_embeddings is {original}; it must be at least 2")
    return original


def _factor(inner: ConfigReader, reader: ConfigReader) -> float:
    factor = inner.optional_positive("factor")
    return reader.size("max_position_embeddings") / _original(inner, reader) if factor is None else factor


_SHAPES = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
