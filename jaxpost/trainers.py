"""The trainers by the names and arguments of TRL's; each makes one `Trainer`."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxpost.methods import (
    METHODS,
    BCOConfig,
    CPOConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ORPOConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
    SimPOConfig,
)
from jaxpost.models.lora_config import LoraConfig, PeftConfig
from jaxpost.models.transformer import Decoder
from jaxpost.rl.rollout_func import RolloutFunction
from jaxpost.train.evaluate import ComputeMetrics
from jaxpost.trainer import Trainer

Name = str | os.PathLike[str] | Decoder | None
Adapter = LoraConfig | PeftConfig | None


def SFTTrainer(
    model: Name = None,
    args: SFTConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
    peft_config: Adapter = None,
    compute_metrics: ComputeMetrics | None = None,
) -> Trainer:
    """Supervised fine-tuning with TRL's argument names; see `Trainer`."""
    data = (train_dataset, eval_dataset, processing_class, formatting_func)
    return Trainer(METHODS["sft"], model, args, *data, peft_config)


def DPOTrainer(
    model: Name = None,
    ref_model: Name = None,
    args: DPOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    compute_metrics: ComputeMetrics | None = None,
) -> Trainer:
    """Direct preference optimisation with TRL's argument names; see `Trainer`."""
    return _trainer(
        "dpo", model, args, train_dataset, eval_dataset, processing_class, peft_config, compute_metrics, ref_model
    )


def KTOTrainer(
    model: Name = None,
    ref_model: Name = None,
    args: KTOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    compute_metrics: ComputeMetrics | None = None,
) -> Trainer:
    """Kahneman-Tversky optimisation with TRL's argument names; see `Trainer`."""
    return _trainer(
        "kto", model, args, train_dataset, eval_dataset, processing_class, peft_config, compute_metrics, ref_model
    )


def BCOTrainer(
    model: Name = None,
    ref_model: Name = None,
    args: BCOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    compute_metrics: ComputeMetrics | None = None,
) -> Trainer:
    """Binary classifier optimisation with TRL's argument names; see `Trainer`."""
    return _trainer(
        "bco", model, args, train_dataset, eval_dataset, processing_class, peft_config, compute_metrics, ref_model
    )


def ORPOTrainer(
    model: Name = None,
    args: ORPOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    compute_metrics: ComputeMetrics | None = None,
) -> Trainer:
    """Odds-ratio preference optimisation with TRL's argument names; see `Trainer`."""
    return _trainer("orpo", model, args, train_dataset, eval_dataset, processing_class, peft_config, compute_metrics)


def CPOTrainer(
    model: Name = None,
    args: CPOConfig | SimPOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    compute_metrics: ComputeMetrics | None = None,
) -> Trainer:
    """CPO, SimPO and AlphaPO with TRL's argument names; see `Trainer`."""
    return _trainer("cpo", model, args, train_dataset, eval_dataset, processing_class, peft_config, compute_metrics)


def RewardTrainer(
    model: Name = None,
    args: RewardConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    compute_metrics: ComputeMetrics | None = None,
) -> Trainer:
    """Reward models with TRL's argument names; see `Trainer`."""
    return _trainer("reward", model, args, train_dataset, eval_dataset, processing_class, peft_config, compute_metrics)


def GRPOTrainer(
    model: Name = None,
    reward_funcs: Any = None,
    args: GRPOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    rollout_func: RolloutFunction | str | None = None,
) -> Trainer:
    """Group relative policy optimisation with TRL's argument names; see `Trainer`."""
    options = {"reward_funcs": reward_funcs, "rollout_func": rollout_func}
    data = (train_dataset, eval_dataset, processing_class)
    return _trainer("grpo", model, args, *data, peft_config, None, **options)


def RLOOTrainer(
    model: Name = None,
    reward_funcs: Any = None,
    args: RLOOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Adapter = None,
    rollout_func: RolloutFunction | str | None = None,
) -> Trainer:
    """REINFORCE leave-one-out with TRL's argument names; see `Trainer`."""
    options = {"reward_funcs": reward_funcs, "rollout_func": rollout_func}
    data = (train_dataset, eval_dataset, processing_class)
    return _trainer("rloo", model, args, *data, peft_config, None, **options)


def PPOTrainer(
    model: Name = None,
    reward_funcs: Any = None,
    args: PPOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    ref_model: Name = None,
    reward_model: Name = None,
    value_model: Name = None,
    peft_config: Adapter = None,
) -> Trainer:
    """Proximal policy optimisation with TRL's argument names; see `Trainer`.

    `reward_model` is one more of `reward_funcs`; one that is loaded reads the policy's tokens.
    """
    rewards = reward_funcs
    if reward_model is not None:
        own = (args.reward_funcs if args else None) if reward_funcs is None else reward_funcs
        first = [own] if isinstance(own, str | Decoder) or callable(own) else list(own or [])
        rewards = [*first, reward_model if isinstance(reward_model, Decoder) else os.fspath(reward_model)]
    data, options = (
        (train_dataset, eval_dataset, processing_class),
        {"reward_funcs": rewards, "value_model": value_model},
    )
    return _trainer("ppo", model, args, *data, peft_config, None, ref_model, **options)


def _trainer(
    name: str,
    model: Name,
    args: Any,
    train: Any,
    held_out: Any,
    tokenizer: Any,
    adapter: Adapter,
    compute_metrics: ComputeMetrics | None,
    ref_model: Name = None,
    reward_funcs: Any = None,
    value_model: Name = None,
    rollout_func: RolloutFunction | str | None = None,
) -> Trainer:
    data = {"train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    options = {"peft_config": adapter, "ref_model": ref_model, "compute_metrics": compute_metrics}
    options |= {"reward_funcs": reward_funcs, "value_model": value_model, "rollout_func": rollout_func}
    return Trainer(METHODS[name], model, args, **data, **options)
