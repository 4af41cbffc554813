"""Learning-rate schedules: at every step what transformers.get_scheduler gives."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.options import nearest, one_of

# Each schedule and the keys that lr_scheduler_kwargs may hold for it.
SCHEDULES = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
_RAMPS = ("linear", "cosine", "1-sqrt")


def learning_rate_schedule(
    name: str, peak: float, *, warmup: int, total_steps: int, kwargs: dict[str, Any]
) -> optax.Schedule:
    """The learning rate of update number `count` (from 0).

    Args:
        name: a key of SCHEDULES.
        peak: the highest learning rate.
        warmup: steps of warm-up.
        total_steps: number of updates in the whole run, not only in what is left of it.
        kwargs: the schedule's own options, from `schedule_kwargs`.

    Returns:
        A function of an int or a traced int32 scalar that gives a float32 scalar.

    Raises:
        ConfigError: the run is too short for the phases of warmup_stable_decay.
    """
    match name:
        case "constant":  # by its name: transformers ignores the warm-up here
            warmup, factor = 0, jnp.ones_like
        case "constant_with_warmup":
            factor = jnp.ones_like
        case "linear":
            factor = _linear(warmup, total_steps)
        case "cosine" | "cosine_with_min_lr":
            factor = _cosine(warmup, total_steps, **kwargs)
        case "inverse_sqrt":
            factor = _inverse_sqrt(warmup, **kwargs)
        case _:  # shapes its warm-up itself
            warmup, factor = 0, _warmup_stable_decay(warmup, total_steps, **kwargs)

    def schedule(count: Any) -> Float[Array, ""]:
        # float32 holds every step number up to 2**24 exactly.
        step = jnp.asarray(count).astype(jnp.float32)
        return peak * jnp.where(step < warmup, step / max(1, warmup), factor(step))

    return schedule


def schedule_kwargs(name: str, text: Any, peak: float) -> dict[str, Any]:
    """lr_scheduler_kwargs as checked keyword arguments, with min_lr turned into min_lr_rate.

    Args:
        name: a key of SCHEDULES.
        text: JSON, a mapping or None.
        peak: the highest learning rate, which an absolute min_lr is measured by.

    Raises:
        ConfigError: not a JSON object, or a key or a value that the schedule does not take.
    """
    example = """a JSON object such as '{"num_cycles": 0.5}'"""
    if isinstance(text, str):
        try:
            kwargs = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"lr_scheduler_kwargs is {text!r}, which is not JSON ({error}); give {example}") from None
    else:
        kwargs = {} if text is None else text  # YAML and Python give a mapping as it is
    if not isinstance(kwargs, dict):
        raise ConfigError(f"lr_scheduler_kwargs is {text!r}; give {example}")
    allowed = SCHEDULES[name]
    for key, value in kwargs.items():
        if key not in allowed:
            takes = f"it takes: {', '.join(allowed)}" if allowed else "it takes none; remove lr_scheduler_kwargs"
            raise ConfigError(f"lr_scheduler_kwargs has {key!r}, unknown to {name}{nearest(key, allowed)}; {takes}")
        if key in ("warmup_type", "decay_type"):
            one_of(f"lr_scheduler_kwargs' {key}", value, _RAMPS)
        else:
            check_number(f"lr_scheduler_kwargs' {key}", value)
    if name == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        raise ConfigError("""warmup_stable_decay needs lr_scheduler_kwargs '{"num_decay_steps": N}'""")
    if kwargs.get("timescale") == 0:
        raise ConfigError("lr_scheduler_kwargs' timescale is 0; give a number of steps")
    return _with_min_lr_rate(peak, dict(kwargs)) if name == "cosine_with_min_lr" else dict(kwargs)


def _with_min_lr_rate(peak: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replace an absolute min_lr by its ratio to the peak."""
    if ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        raise ConfigError(
            "cosine_with_min_lr needs lr_scheduler_kwargs with one of min_lr (absolute) and min_lr_rate (of the peak)"
        )
    if "min_lr" in kwargs:
        min_lr = kwargs.pop("min_lr")
        if min_lr > peak or peak == 0:
            raise ConfigError(f"lr_scheduler_kwargs' min_lr is {min_lr}, but learning_rate is {peak}")
        kwargs["min_lr_rate"] = min_lr / peak
    check_number("lr_scheduler_kwargs' min_lr_rate", kwargs["min_lr_rate"], most=1.0)
    return kwargs


def check_number(name: str, value: Any, *, least: float = 0.0, most: float = math.inf, below: float = math.inf) -> None:
    """Raise ConfigError unless `value` is a finite number with least <= value <= most and value < below."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it takes a finite number")
    if value < least:
        raise ConfigError(f"{name} is {value}; it must not be below {least:g}")
    if value > most:
        raise ConfigError(f"{name} is {value}; it must not be above {most:g}")
    if value >= below:
        raise ConfigError(f"{name} is {value}; it must be below {below:g}")


Factor = Callable[[Float[Array, ""]], Float[Array, ""]]


def _linear(warmup: int, total_steps: int) -> Factor:
    return lambda step: jnp.maximum(0.0, (total_steps - step) / max(1, total_steps - warmup))


def _cosine(warmup: int, total_steps: int, num_cycles: float = 0.5, min_lr_rate: float = 0.0) -> Factor:
    length = max(1, total_steps - warmup)
    return lambda step: _wave(step - warmup, length, num_cycles) * (1 - min_lr_rate) + min_lr_rate


def _wave(done: Float[Array, ""], length: int, num_cycles: float) -> Float[Array, ""]:
    """(1 + cos(2 pi num_cycles done / length)) / 2, as a squared sine of the distance to the wave's nearest zero.

    The plain formula loses all digits in float32 where it approaches 0, which is where a run ends.
    """
    done = num_cycles * done
    distance = done - (jnp.floor(done / length) + 0.5) * length
    return jnp.square(jnp.sin(jnp.pi * distance / length))


def _inverse_sqrt(warmup: int, timescale: float | None = None) -> Factor:
    timescale = timescale or warmup or 10_000
    return lambda step: 1 / jnp.sqrt((step + (timescale - warmup)) / timescale)


def _warmup_stable_decay(
    warmup: int,
    total_steps: int,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Factor:
    """Warm up, stay at the peak, decay to min_lr_ratio of it."""
    if num_stable_steps is None:
        num_stable_steps = total_steps - warmup - num_decay_steps
    if num_stable_steps < 0:
        raise ConfigError(
            f"num_decay_steps is {num_decay_steps}; with {warmup} warm-up steps it exceeds the run of {total_steps}"
        )
    decay_start = warmup + num_stable_steps

    def factor(step: Float[Array, ""]) -> Float[Array, ""]:
        # Beyond its own phase a ramp's value is not used; the clip keeps its square root real.
        up = _ramp(jnp.clip(warmup - step, 0, warmup), max(1, warmup), warmup_type, 0.5)
        down = _ramp(jnp.clip(step - decay_start, 0, num_decay_steps), max(1, num_decay_steps), decay_type, num_cycles)
        scaled_up, scaled_down = (value * (1 - min_lr_ratio) + min_lr_ratio for value in (up, down))
        after = jnp.where(step < decay_start + num_decay_steps, scaled_down, min_lr_ratio)
        return jnp.where(step < warmup, scaled_up, jnp.where(step < decay_start, 1.0, after))

    return factor


def _ramp(done: Float[Array, ""], length: int, kind: str, num_cycles: float) -> Float[Array, ""]:
    """From 1 at done = 0 down to 0 at done = length."""
    if kind == "linear":
        return (length - done) / length
    if kind == "cosine":
        return _wave(done, length, num_cycles)
    # 1 - sqrt(p) without its cancellation near p = 1.
    return (length - done) / length / (1 + jnp.sqrt(done / length))
