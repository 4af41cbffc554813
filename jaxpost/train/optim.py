"""AdamW, learning-rate schedules and gradient clipping: step for step what transformers and torch compute."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.options import nearest, one_of, option

# Each schedule and the keys that lr_scheduler_kwargs may hold for it.
_SCHEDULE_KEYS = {
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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer's settings, named and defaulted as in transformers' TrainingArguments.

    Raises:
        ConfigError: a value is out of its range; the message names the field.
    """

    learning_rate: float = option(5e-5, "Peak learning rate of AdamW.")
    weight_decay: float = option(0.0, "Decoupled weight decay; biases and norm scales are left out.")
    adam_beta1: float = option(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment.")
    adam_epsilon: float = option(1e-8, "Added to the denominator of AdamW's update.")
    max_grad_norm: float | None = option(1.0, "Gradients are scaled down to this global norm; 0 turns clipping off.")
    lr_scheduler_type: str = option("linear", f"Learning-rate schedule: {', '.join(_SCHEDULE_KEYS)}.")
    lr_scheduler_kwargs: str | None = option(
        None, """The schedule's own options as JSON, e.g. '{"min_lr_rate": 0.1}'."""
    )
    warmup_steps: float = option(0, "Steps of linear warm-up from 0; below 1, a fraction of all steps.")
    warmup_ratio: float | None = option(None, "Warm-up as a fraction of all steps (the older name).")

    def __post_init__(self) -> None:
        _check("learning_rate", self.learning_rate)
        _check("weight_decay", self.weight_decay)
        _check("adam_beta1", self.adam_beta1, below=1.0)
        _check("adam_beta2", self.adam_beta2, below=1.0)
        _check("adam_epsilon", self.adam_epsilon)
        if self.adam_epsilon == 0:
            raise ConfigError("adam_epsilon is 0, so a gradient of 0 gives NaN; set a small number such as 1e-8")
        if self.max_grad_norm is not None:
            _check("max_grad_norm", self.max_grad_norm, least=-math.inf)
        _check("warmup_steps", self.warmup_steps)
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps}; give a whole number of steps, or a fraction of all steps below 1"
            )
        if self.warmup_ratio is not None:
            _check("warmup_ratio", self.warmup_ratio, most=1.0)
            if self.warmup_steps and self.warmup_ratio:
                raise ConfigError("warmup_steps and warmup_ratio both set the warm-up; remove one of them")
        one_of("lr_scheduler_type", self.lr_scheduler_type, tuple(_SCHEDULE_KEYS))
        _schedule_kwargs(self)


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of update number `count` (from 0), equal to transformers.get_scheduler's.

    Args:
        config: names the schedule, its peak and its warm-up.
        total_steps: number of updates in the whole run, not only in what is left of it.

    Returns:
        A function of an int or a traced int32 scalar that gives a float32 scalar.

    Raises:
        ConfigError: the run is too short for the phases of warmup_stable_decay.
    """
    kwargs = _schedule_kwargs(config)
    warmup = _warmup_steps(config, total_steps)
    match config.lr_scheduler_type:
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
        return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor(step))

    return schedule


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, decay_mask: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with float32 moments, whatever the parameters' dtype.

    Args:
        config: betas, epsilon and weight decay. Clipping is not in here: see `clip_by_global_norm`.
        schedule: learning rate by update number, from 0.
        decay_mask: booleans in the parameters' tree; decay applies where True.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    # optax gives the second moment the parameters' dtype; in bfloat16 its update by 0.1 % would round away.
    return optax.GradientTransformation(
        init=lambda params: adamw.init(_float32(params)),
        update=lambda updates, state, params=None: adamw.update(_float32(updates), state, _float32(params)),
    )


def clip_by_global_norm(grads: Any, max_norm: float | None) -> tuple[Any, Float[Array, ""]]:
    """Scale `grads` by min(1, max_norm / (norm + 1e-6)), torch.nn.utils.clip_grad_norm_'s rule.

    Args:
        grads: a tree of arrays; each keeps its dtype.
        max_norm: the largest global L2 norm; None or <= 0 leaves the gradients alone.

    Returns:
        (gradients, norm before clipping as a float32 scalar).
    """
    norm = jnp.asarray(optax.tree.norm(_float32(grads)), jnp.float32)
    if max_norm is None or max_norm <= 0:
        return grads, norm
    scale = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
    return jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads), norm


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _check(name: str, value: Any, *, least: float = 0.0, most: float = math.inf, below: float = math.inf) -> None:
    """Raise ConfigError unless `value` is a finite number with least <= value <= most and value < below."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it takes a finite number")
    if value < least:
        raise ConfigError(f"{name} is {value}; it must not be below {least:g}")
    if value > most:
        raise ConfigError(f"{name} is {value}; it must not be above {most:g}")
    if value >= below:
        raise ConfigError(f"{name} is {value}; it must be below {below:g}")


def _warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Whole warm-up steps, as transformers' TrainingArguments.get_warmup_steps counts them."""
    warmup = config.warmup_steps or config.warmup_ratio or 0
    if config.warmup_steps >= 1:
        return int(warmup)
    return math.ceil(total_steps * warmup)


def _schedule_kwargs(config: OptimConfig) -> dict[str, Any]:
    """lr_scheduler_kwargs as checked keyword arguments, with min_lr turned into min_lr_rate."""
    name, text = config.lr_scheduler_type, config.lr_scheduler_kwargs
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
    allowed = _SCHEDULE_KEYS[name]
    for key, value in kwargs.items():
        if key not in allowed:
            takes = f"it takes: {', '.join(allowed)}" if allowed else "it takes none; remove lr_scheduler_kwargs"
            raise ConfigError(f"lr_scheduler_kwargs has {key!r}, unknown to {name}{nearest(key, allowed)}; {takes}")
        if key in ("warmup_type", "decay_type"):
            one_of(f"lr_scheduler_kwargs' {key}", value, _RAMPS)
        else:
            _check(f"lr_scheduler_kwargs' {key}", value)
    if name == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        raise ConfigError("""warmup_stable_decay needs lr_scheduler_kwargs '{"num_decay_steps": N}'""")
    if kwargs.get("timescale") == 0:
        raise ConfigError("lr_scheduler_kwargs' timescale is 0; give a number of steps")
    return _with_min_lr_rate(config, dict(kwargs)) if name == "cosine_with_min_lr" else dict(kwargs)


def _with_min_lr_rate(config: OptimConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replace an absolute min_lr by its ratio to the peak."""
    if ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        raise ConfigError(
            "cosine_with_min_lr needs lr_scheduler_kwargs with one of min_lr (absolute) and min_lr_rate (of the peak)"
        )
    if "min_lr" in kwargs:
        min_lr = kwargs.pop("min_lr")
        if min_lr > config.learning_rate or config.learning_rate == 0:
            raise ConfigError(f"lr_scheduler_kwargs' min_lr is {min_lr}, but learning_rate is {config.learning_rate}")
        kwargs["min_lr_rate"] = min_lr / config.learning_rate
    _check("lr_scheduler_kwargs' min_lr_rate", kwargs["min_lr_rate"], most=1.0)
    return kwargs


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
