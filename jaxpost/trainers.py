"""The trainers by the names and arguments of TRL's; each makes one `Trainer`.

Arguments that are not written out here are given by name: those of `Options`, and with what TRL has beyond them the
error says what to write.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypedDict, Unpack

from jaxpost.errors import ConfigError
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
)
from jaxpost.models.lora_config import LoraConfig, PeftConfig
from jaxpost.models.pretrained import named
from jaxpost.models.transformer import Decoder
from jaxpost.options import nearest
from jaxpost.rl.rollout_func import RolloutFunction
from jaxpost.train.evaluate import ComputeMetrics
from jaxpost.trainer import Trainer

Model = str | os.PathLike[str] | Decoder | None
P = ParamSpec("P")


class Options(TypedDict, total=False):
    """What every trainer takes by name."""

    tokenizer: Any  # the older name of processing_class
    peft_config: LoraConfig | PeftConfig | None
    callbacks: Sequence[Any] | None
    compute_metrics: ComputeMetrics | None


class TextOptions(Options, total=False):
    """What SFTTrainer takes by name."""

    formatting_func: Callable[[Mapping[str, Any]], str] | None


class PromptOptions(Options, total=False):
    """What BCOTrainer takes by name."""

    embedding_func: Callable[[list[str]], Any] | None


class SamplingOptions(Options, total=False):
    """What trainers that compare completions take by name."""

    rollout_func: RolloutFunction | str | None


class RewardOptions(Options, total=False):
    """What PPOTrainer takes by name."""

    reward_funcs: Any


# What TRL's trainers take and these do not: what to write instead.
INSTEAD = {
    "data_collator": "batches are made of rows: give packing, padding_free and max_length in args",
    "compute_loss_func": "losses are functions of arrays: see 'Add an objective' in the README",
    "optimizers": "give optim, learning_rate, lr_scheduler_type and their kin in args",
    "optimizer_cls_and_kwargs": "give optim, learning_rate, lr_scheduler_type and their kin in args",
    "preprocess_logits_for_metrics": "logits are never kept; compute_metrics is given the reward of every example",
    "quantization_config": "give load_in_4bit=True or load_in_8bit=True in args, with use_peft=True",
    "model_init": "give model, by its name",
    "model_init_kwargs": "give dtype, attn_implementation and model_revision in args",
    "reward_processing_classes": "a reward model is given by name, and read with its own tokenizer",
    "tools": "give rollout_func, which calls them",
    "environment_factory": "give rollout_func, which acts in it",
    "embedding_tokenizer": "embedding_func is given texts; or name a model in args, as embedding_model",
    **dict.fromkeys(["model_adapter_name", "ref_adapter_name"], "give ref_model"),
    **dict.fromkeys(["max_seq_length", "max_length"], "give max_length in args"),
    "packing": "give packing in args",
    "dataset_text_field": "give dataset_text_field in args",
    "beta": "give beta in args",
}


def _trains(method: str) -> Callable[[Callable[P, Trainer]], Callable[P, Trainer]]:
    """Let a signature make the trainer of a method."""

    def decorate(face: Callable[P, Trainer]) -> Callable[P, Trainer]:
        signature = inspect.signature(face)
        *plain, rest = signature.parameters.values()
        more = rest.annotation.__args__[0].__annotations__
        keywords = [
            inspect.Parameter(name, rest.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in more.items()
        ]
        whole = signature.replace(parameters=[*plain, *keywords])
        known = [*whole.parameters, *INSTEAD]

        @wraps(face)
        def make(*words: P.args, **given: P.kwargs) -> Trainer:
            if len(words) > len(plain):
                raise ConfigError(f"{face.__name__}: give the arguments after {plain[-1].name} by name")
            arguments = {**dict(zip(whole.parameters, words, strict=False)), **given}
            if twice := given.keys() & dict(zip(whole.parameters, words, strict=False)).keys():
                raise ConfigError(f"{face.__name__}: {', '.join(sorted(twice))} is given twice")
            for name in arguments.keys() - whole.parameters.keys() - INSTEAD.keys():
                raise ConfigError(f"{face.__name__} has no argument {name!r}{nearest(name, known)}")
            return Trainer(METHODS[method], **_settled(arguments))

        refuse = f"{face.__name__} is a function: subclasses of it would change nothing here; see callbacks, and "
        refuse += "'Add an objective' in the README"
        vars(make).update(__signature__=whole, __mro_entries__=lambda bases: _refuse(refuse))
        return make

    return decorate


def _refuse(message: str) -> Any:
    raise ConfigError(message)


def _settled(arguments: dict[str, Any]) -> dict[str, Any]:
    """TRL's arguments as those of `Trainer`.

    Raises:
        ConfigError: one of them means nothing here.
    """
    for name in INSTEAD.keys() & arguments.keys():
        if arguments.pop(name) not in (None, (None, None)):
            raise ConfigError(f"{name} is not there: {INSTEAD[name]}")
    tokenizer = arguments.pop("tokenizer", None)
    if tokenizer is not None and arguments.get("processing_class") is not None:
        raise ConfigError("tokenizer is the older name of processing_class; give one of them")
    if tokenizer is not None:
        arguments["processing_class"] = tokenizer
    judge = arguments.pop("reward_model", None)
    if judge is not None:  # one more of the reward functions
        judge = judge if isinstance(judge, Decoder) else os.fspath(named(judge, "reward_model"))
        own, args = arguments.get("reward_funcs"), arguments.get("args")
        own = (args.reward_funcs if args else None) if own is None else own
        first = [own] if isinstance(own, str | Decoder) or callable(own) else list(own or [])
        arguments["reward_funcs"] = [*first, judge]
    return arguments


@_trains("sft")
def SFTTrainer(
    model: Model = None,
    args: SFTConfig | None = None,
    data_collator: None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[TextOptions],
) -> Trainer:
    """Supervised fine-tuning; see `Trainer`."""
    ...


@_trains("dpo")
def DPOTrainer(
    model: Model = None,
    ref_model: Model = None,
    args: DPOConfig | None = None,
    data_collator: None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[Options],
) -> Trainer:
    """Direct preference optimisation; see `Trainer`."""
    ...


@_trains("kto")
def KTOTrainer(
    model: Model = None,
    ref_model: Model = None,
    args: KTOConfig | None = None,
    data_collator: None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[Options],
) -> Trainer:
    """Kahneman-Tversky optimisation; see `Trainer`."""
    ...


@_trains("bco")
def BCOTrainer(
    model: Model = None,
    ref_model: Model = None,
    args: BCOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    data_collator: None = None,
    **options: Unpack[PromptOptions],
) -> Trainer:
    """Binary classifier optimisation; see `Trainer`. `embedding_func` gives up to 256 texts points [N, E]."""
    ...


@_trains("orpo")
def ORPOTrainer(
    model: Model = None,
    args: ORPOConfig | None = None,
    data_collator: None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[Options],
) -> Trainer:
    """Odds-ratio preference optimisation; see `Trainer`."""
    ...


@_trains("cpo")
def CPOTrainer(
    model: Model = None,
    args: CPOConfig | None = None,
    data_collator: None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[Options],
) -> Trainer:
    """CPO, SimPO and AlphaPO; see `Trainer`."""
    ...


@_trains("reward")
def RewardTrainer(
    model: Model = None,
    args: RewardConfig | None = None,
    data_collator: None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[Options],
) -> Trainer:
    """Reward models; see `Trainer`."""
    ...


@_trains("grpo")
def GRPOTrainer(
    model: Model = None,
    reward_funcs: Any = None,
    args: GRPOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[SamplingOptions],
) -> Trainer:
    """Group relative policy optimisation; see `Trainer`."""
    ...


@_trains("rloo")
def RLOOTrainer(
    model: Model = None,
    reward_funcs: Any = None,
    args: RLOOConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **options: Unpack[SamplingOptions],
) -> Trainer:
    """REINFORCE leave-one-out; see `Trainer`."""
    ...


@_trains("ppo")
def PPOTrainer(
    args: PPOConfig | None = None,
    processing_class: Any = None,
    model: Model = None,
    ref_model: Model = None,
    reward_model: Model = None,
    train_dataset: Any = None,
    value_model: Model = None,
    data_collator: None = None,
    eval_dataset: Any = None,
    **options: Unpack[RewardOptions],
) -> Trainer:
    """Proximal policy optimisation; see `Trainer`.

    `reward_model` is one more of `reward_funcs`; one that is loaded reads the policy's tokens.
    """
    ...
