"""Optimizers and gradient clipping: step for step what torch and transformers compute."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jaxpost.errors import ConfigError
from jaxpost.options import Group, check_choices, option
from jaxpost.sharding import path_of
from jaxpost.train.moments import adam_8bit, adam_bf16, is_matrix, scale_by_adafactor
from jaxpost.train.schedule import SCHEDULES, check_number, learning_rate_schedule, schedule_kwargs

OPTIMIZERS = ("adamw", "adamw_bf16", "adamw_8bit", "adafactor", "lion", "muon")
# transformers' names of them.
ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "lion_32bit": "lion",
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer's settings, named and defaulted as in transformers' TrainingArguments.

    Raises:
        ConfigError: a value is out of its range; the message names the field.
    """

    help_group = Group.OPTIMISATION

    optim: str = option(
        "adamw", f"Optimizer: {', '.join(OPTIMIZERS)}; or transformers' name of one.", choices=(*OPTIMIZERS, *ALIASES)
    )
    learning_rate: float = option(5e-5, "Peak learning rate.")
    weight_decay: float = option(0.0, "Decoupled weight decay; biases and norm scales are left out.")
    adam_beta1: float = option(0.9, "Decay of the first moment of AdamW and Lion.")
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment; of Lion's momentum.")
    adam_epsilon: float = option(1e-8, "Added to the denominator of AdamW's update.")
    offload_optimizer: bool = option(
        False, "Keep the optimizer's state in the host's memory between steps.", may_change=True
    )
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the learning rate of LoRA's second factors (lora_b), as a multiple of learning_rate."
    )
    max_grad_norm: float | None = option(1.0, "Gradients are scaled down to this global norm; 0 turns clipping off.")
    lr_scheduler_type: str = option("linear", f"Learning-rate schedule: {', '.join(SCHEDULES)}.", choices=SCHEDULES)
    lr_scheduler_kwargs: str | None = option(
        None, """The schedule's own options as JSON, e.g. '{"min_lr_rate": 0.1}'."""
    )
    warmup_steps: float = option(0, "Steps of linear warm-up from 0; below 1, a fraction of all steps.")
    warmup_ratio: float | None = option(None, "Warm-up as a fraction of all steps (the older name).")

    def __post_init__(self) -> None:
        check_choices(self)
        check_number("learning_rate", self.learning_rate)
        check_number("weight_decay", self.weight_decay)
        check_number("adam_beta1", self.adam_beta1, below=1.0)
        check_number("adam_beta2", self.adam_beta2, below=1.0)
        check_number("adam_epsilon", self.adam_epsilon)
        if self.adam_epsilon == 0:
            raise ConfigError("adam_epsilon is 0, so a gradient of 0 gives NaN; set a small number such as 1e-8")
        if self.loraplus_lr_ratio is not None:
            check_number("loraplus_lr_ratio", self.loraplus_lr_ratio)
            if self.loraplus_lr_ratio == 0:
                raise ConfigError(
                    "loraplus_lr_ratio is 0, so lora_b would not be trained; leave it out, or set e.g. 16"
                )
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, least=-math.inf)
        check_number("warmup_steps", self.warmup_steps)
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps}; give a whole number of steps, or a fraction of all steps below 1"
            )
        if self.warmup_ratio is not None:
            check_number("warmup_ratio", self.warmup_ratio, most=1.0)
            if self.warmup_steps and self.warmup_ratio:
                raise ConfigError("warmup_steps and warmup_ratio both set the warm-up; remove one of them")
        schedule_kwargs(self.lr_scheduler_type, self.lr_scheduler_kwargs, self.learning_rate)

    @property
    def depends_on_length(self) -> bool:
        """Whether the learning rate of a step depends on how many there will be."""
        is_constant = self.lr_scheduler_type in ("constant", "constant_with_warmup")
        return not is_constant or bool(self.warmup_ratio) or 0 < self.warmup_steps < 1

    def rates(self) -> dict[str, float]:
        """Peak learning rates of parts of the model that have their own, by the first name of their paths."""
        return {}


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
    return learning_rate_schedule(
        config.lr_scheduler_type,
        config.learning_rate,
        warmup=_warmup_steps(config, total_steps),
        total_steps=total_steps,
        kwargs=schedule_kwargs(config.lr_scheduler_type, config.lr_scheduler_kwargs, config.learning_rate),
    )


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, decay_mask: Any) -> optax.GradientTransformation:
    """The optimizer that `config.optim` names; it computes in float32, whatever the parameters' dtype.

    Weight decay is decoupled for all (Loshchilov and Hutter, 2019, arXiv:1711.05101). `init` raises ConfigError for a
    `loraplus_lr_ratio` without LoRA.

    Args:
        config: betas, epsilon and weight decay. Clipping is not in here: see `clip_by_global_norm`.
        schedule: learning rate by update number, from 0.
        decay_mask: booleans in the parameters' tree; decay applies where True.
    """
    parts = [
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.loraplus_lr_ratio is not None:
        parts.append(_scale_lora_b(config.loraplus_lr_ratio))
    for name, rate in config.rates().items():
        parts.append(_scale_part(name, rate / config.learning_rate))
    optimizer = optax.chain(*parts)

    def init(params: Any) -> Any:
        check_loraplus(config, params)
        return optimizer.init(_float32(params))

    # optax gives moments the parameters' dtype; `moments` says what stores them in fewer bits.
    return optax.GradientTransformation(
        init=init,
        update=lambda updates, state, params=None: optimizer.update(_float32(updates), state, _float32(params)),
    )


def check_loraplus(config: OptimConfig, params: Any) -> None:
    """Raise ConfigError if `loraplus_lr_ratio` is set and none of the trainable `params` is a `lora_b`."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(params))
    if config.loraplus_lr_ratio is not None and not any(map(_is_lora_b, paths)):
        raise ConfigError(
            f"loraplus_lr_ratio is {config.loraplus_lr_ratio}, but the run trains no LoRA adapter; leave it out, or "
            "set --use_peft"
        )


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    """The update before weight decay and learning rate."""
    adam = optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon)
    match ALIASES.get(config.optim, config.optim):
        case "adamw":
            return adam
        case "adamw_bf16":
            return adam_bf16(adam)
        case "adamw_8bit":
            return adam_8bit(adam)
        case "adafactor":
            return scale_by_adafactor()
        case "lion":
            return optax.scale_by_lion(config.adam_beta1, config.adam_beta2)
        case _:
            return optax.partition({"muon": _muon(), "adamw": adam}, _muon_or_adamw)


def _muon() -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) at AdamW's learning rate and decay (Liu et al., 2025, arXiv:2502.16982).

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and its defaults. optax.contrib.muon corrects the bias of its
    momentum, so its first updates differ, and its state has an array that is no parameter's.
    """
    # Momentum adds gradients up here and averages them in torch; the norm in `orthogonalize` takes the factor out.
    momentum = optax.trace(decay=0.95, nesterov=True)

    def update(matrix: Array) -> Array:
        return 0.2 * math.sqrt(max(matrix.shape[-2:])) * orthogonalize(matrix)

    return optax.chain(momentum, optax.stateless(lambda updates, _: jax.tree.map(update, updates)))


def orthogonalize(x: Float[Array, "*stack in out"]) -> Float[Array, "*stack in out"]:
    """Bring each matrix's singular values near 1 by five Newton-Schulz iterations (Jordan et al., 2024)."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT).mT
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def _muon_or_adamw(params: Any) -> Any:
    """Muon is for the matrices inside of the network; embeddings, heads and vectors are AdamW's."""

    def label(path: Any, _: Array) -> str:
        outside = path_of(path).endswith((".embedding", "head.kernel"))
        return "muon" if is_matrix(path) and not outside else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _scale_lora_b(ratio: float) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al., 2024, arXiv:2402.12354): another learning rate for LoRA's second factor."""

    def scale(path: Any, update: Array) -> Array:
        return update * ratio if _is_lora_b(path) else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _scale_part(name: str, ratio: float) -> optax.GradientTransformation:
    """Another learning rate for what has this first name."""

    def scale(path: Any, update: Array) -> Array:
        return update * ratio if path_of(path).startswith(f"{name}.") else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _is_lora_b(path: Any) -> bool:
    return path_of(path).endswith("lora_b")


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


def _warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Whole warm-up steps, as transformers' TrainingArguments.get_warmup_steps counts them."""
    warmup = config.warmup_steps or config.warmup_ratio or 0
    if config.warmup_steps >= 1:
        return int(warmup)
    return math.ceil(total_steps * warmup)
