"""The methods: what each is configured by, which objective it trains and how its rows are encoded."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxpost.compilation import CompilationConfig
from jaxpost.data.chat import ACCEPTED, SFTDataConfig
from jaxpost.data.completions import COMPARED, JUDGED
from jaxpost.data.examples import ON_LONG_ROW, LengthConfig
from jaxpost.data.formats import DatasetType
from jaxpost.data.loader import LoaderConfig
from jaxpost.data.packing import PackingConfig
from jaxpost.data.sources import DatasetConfig
from jaxpost.data.store import StoreConfig
from jaxpost.data.tokenizer import TokenizerConfig
from jaxpost.encode import Encoded, encode_compared, encode_sft, encode_unpaired
from jaxpost.errors import ConfigError
from jaxpost.foreign import user_config
from jaxpost.hub import HubConfig
from jaxpost.models.actor_critic import ValueModelConfig
from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import ModelArguments
from jaxpost.models.lora_config import LoRAArguments
from jaxpost.models.quant import QuantConfig
from jaxpost.objectives.bco import BCO
from jaxpost.objectives.cpo import CPO
from jaxpost.objectives.cpo_losses import CPO_LOSSES
from jaxpost.objectives.dpo import DPO
from jaxpost.objectives.grpo import GRPO
from jaxpost.objectives.kto import KTO
from jaxpost.objectives.orpo import ORPO
from jaxpost.objectives.ppo import CRITIC, PPO
from jaxpost.objectives.reward import Reward
from jaxpost.objectives.rloo import RLOO
from jaxpost.objectives.sft import SFT
from jaxpost.options import Group, check_parts, option, without_secrets
from jaxpost.processes import ProcessesConfig
from jaxpost.prompt_weights import PromptWeightsConfig
from jaxpost.rl.plan import EpochsConfig, RolloutConfig
from jaxpost.rl.rewards import RewardFunctionsConfig
from jaxpost.rl.sampling import SamplingConfig
from jaxpost.sharding import MeshConfig
from jaxpost.train.checkpoint_config import CheckpointConfig
from jaxpost.train.evaluate import EvalConfig
from jaxpost.train.logging import LoggingConfig
from jaxpost.train.loop import LoopConfig
from jaxpost.train.optim import OptimConfig
from jaxpost.train.reference import ReferenceConfig
from jaxpost.train.schedule import check_number
from jaxpost.train.spikes import SpikeConfig
from jaxpost.watch import WatchConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ModelArguments,
    LoRAArguments,
    QuantConfig,
    DatasetConfig,
    TokenizerConfig,
    StoreConfig,
    LoaderConfig,
    OptimConfig,
    LoopConfig,
    EvalConfig,
    CheckpointConfig,
    LoggingConfig,
    HubConfig,
    MeshConfig,
    CompilationConfig,
    ProcessesConfig,
    WatchConfig,
    SpikeConfig,
):
    """The fields that every method shares; each is declared beside the code that reads it."""

    def __post_init__(self) -> None:
        check_parts(self)
        if self.load_best_model_at_end and not self._evaluates_what_it_saves():
            rhythm = f"eval_strategy is {self.eval_strategy}, save_strategy {self.save_strategy}"
            raise ConfigError(
                f"load_best_model_at_end chooses among checkpoints that were evaluated, but {rhythm}; give both the "
                "same, and a save_steps that is a multiple of eval_steps"
            )

    def _evaluates_what_it_saves(self) -> bool:
        if self.eval_strategy != "steps":
            return self.eval_strategy == self.save_strategy == "epoch"
        return self.save_strategy == "steps" and self.save_steps % (self.eval_steps or self.logging_steps) == 0


@user_config
class SFTConfig(TrainConfig, SFTDataConfig, PackingConfig, SFT):
    """Supervised fine-tuning; names and defaults are TRL's."""

    learning_rate: float = option(2e-5, "Peak learning rate.")


@dataclass(frozen=True, kw_only=True)
class CompletionsConfig(TrainConfig, LengthConfig):
    """What the methods share that compare or judge completions."""

    help_group = Group.ADAPTER

    learning_rate: float = option(1e-6, "Peak learning rate.")
    disable_dropout: bool = option(True, "Train without the dropout of adapters.")


@dataclass(frozen=True, kw_only=True)
class PairsConfig(CompletionsConfig):
    """What the methods share that compare two completions of a prompt."""

    help_group = Group.BATCH

    share_prompts: bool | None = option(
        None, "Read a prompt once for its completions; by default where the model allows it without a difference."
    )

    @property
    def rows_may_branch(self) -> bool:
        return self.share_prompts is not False


@user_config
class DPOConfig(PairsConfig, ReferenceConfig, DPO):
    """Direct preference optimisation; names and defaults are TRL's."""


@user_config
class KTOConfig(CompletionsConfig, ReferenceConfig, KTO):
    """Kahneman-Tversky optimisation; names and defaults are TRL's."""


@user_config
class BCOConfig(CompletionsConfig, ReferenceConfig, PromptWeightsConfig, BCO):
    """Binary classifier optimisation; names and defaults are TRL's."""

    learning_rate: float = option(5e-7, "Peak learning rate.")


@user_config
class ORPOConfig(PairsConfig, ORPO):
    """Odds-ratio preference optimisation; names and defaults are TRL's."""


@user_config
class CPOConfig(PairsConfig, CPO):
    """Contrastive preference optimisation; names and defaults are TRL's."""


@user_config
class SimPOConfig(CPOConfig):
    """Simple preference optimisation: CPO as its authors run it on Llama 3 (SimPO's table 8)."""

    loss_type: str = option("simpo", f"Loss: {', '.join(CPO_LOSSES)}.", choices=CPO_LOSSES)
    cpo_alpha: float = option(0.0, "Weight of the NLL of the chosen completions.")
    beta: float = option(2.0, "Scale of the log-probabilities.")
    simpo_gamma: float = option(1.0, "Margin that simpo asks for.")


@user_config
class RewardConfig(PairsConfig, Reward):
    """Reward models; names and defaults are TRL's, where pairs that are too long are left out."""

    learning_rate: float = option(1e-4, "Peak learning rate.")
    on_long_row: str = option(
        "drop", "What becomes of a pair over max_length: drop, truncate or error.", choices=ON_LONG_ROW
    )


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(TrainConfig, ReferenceConfig, SamplingConfig, RewardFunctionsConfig):
    """What the methods share that learn from completions of the policy."""

    help_group = Group.ADAPTER

    learning_rate: float = option(1e-6, "Peak learning rate.")
    disable_dropout: bool = option(False, "Train without the dropout of adapters.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precompute_ref_log_probs:
            raise ConfigError("precompute_ref_log_probs: completions are not known in advance; leave it out")

    @property
    def rows_may_branch(self) -> bool:
        return True

    @property
    def reward_models(self) -> list[str]:
        """Models that reward completions, beside what reward_funcs names."""
        return []


@user_config
class GRPOConfig(OnlineConfig, RolloutConfig, GRPO):
    """Group relative policy optimisation; names and defaults are TRL's."""


@user_config
class RLOOConfig(OnlineConfig, RolloutConfig, RLOO):
    """REINFORCE leave-one-out; names and defaults are TRL's."""

    num_generations: int = option(2, "Completions of each prompt that are compared with each other.")


@user_config
class PPOConfig(OnlineConfig, EpochsConfig, ValueModelConfig, PPO):
    """Proximal policy optimisation; names and defaults are TRL's."""

    learning_rate: float = option(3e-6, "Peak learning rate.")
    temperature: float = option(0.7, "Softmax temperature of sampling, which also divides the logits in training.")
    value_learning_rate: float | None = option(None, "That of the value model; null for learning_rate.")
    disable_dropout: bool = option(True, "Train without the dropout of adapters.")
    reward_model_path: str | None = option(None, "A reward model whose score is one more reward, after reward_funcs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_learning_rate is not None:
            check_number("value_learning_rate", self.value_learning_rate)
            if self.learning_rate == 0:
                raise ConfigError(
                    "value_learning_rate is a multiple of learning_rate, which is 0; use value_warmup_steps"
                )

    @property
    def reward_models(self) -> list[str]:
        return [] if self.reward_model_path is None else [self.reward_model_path]

    def rates(self) -> dict[str, float]:
        return {} if self.value_learning_rate is None else {CRITIC: self.value_learning_rate}


PROMPTS: tuple[DatasetType, ...] = ("prompt_only",)


class Method(NamedTuple):
    """What the wiring needs to know of a method.

    Attributes:
        name: the command.
        config: what it is configured by.
        objective: its part of the config, which is what is trained.
        encode: how rows become examples; None where completions are sampled.
        accepted: the types of rows that can be trained on.
        head: of the model.
        has_critic: whether a value model is trained beside it.
    """

    name: str
    config: type[Any]
    objective: type[Any]
    encode: Callable[..., Encoded] | None
    accepted: tuple[DatasetType, ...]
    head: str = "lm"
    has_critic: bool = False

    @property
    def is_online(self) -> bool:
        """Whether the policy samples what it learns from."""
        return self.encode is None

    def rows(self, config: Any) -> dict[str, Any]:
        """Which types of rows can be trained on, as `type_of` takes it."""
        return {"accepted": self.accepted} | (
            {"text_field": config.dataset_text_field} if isinstance(config, SFTDataConfig) else {}
        )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sft", SFTConfig, SFT, encode_sft, ACCEPTED),
        Method("dpo", DPOConfig, DPO, encode_compared, COMPARED),
        Method("orpo", ORPOConfig, ORPO, encode_compared, COMPARED),
        Method("cpo", CPOConfig, CPO, encode_compared, COMPARED),
        Method("simpo", SimPOConfig, CPO, encode_compared, COMPARED),
        Method("kto", KTOConfig, KTO, encode_unpaired, JUDGED),
        Method("bco", BCOConfig, BCO, encode_unpaired, JUDGED),
        Method("reward", RewardConfig, Reward, encode_compared, COMPARED, head="reward"),
        Method("grpo", GRPOConfig, GRPO, None, PROMPTS),
        Method("rloo", RLOOConfig, RLOO, None, PROMPTS),
        Method("ppo", PPOConfig, PPO, None, PROMPTS, has_critic=True),
    )
}


def suited_to(config: Any, model: ModelConfig) -> Any:
    """The config with a value where it leaves one to the model: `router_aux_loss_coef` and `share_prompts`.

    Raises:
        ConfigError: a value that this model cannot have.
    """
    return _with_shared_prompts(_with_router_coef(config, model), model)


def _with_shared_prompts(config: Any, model: ModelConfig) -> Any:
    """Prompts are shared unless that changes what the model says."""
    if not isinstance(config, PairsConfig):
        return config
    if config.share_prompts and not model.reads_branches:
        kind = model.hf.get("model_type", "this")
        raise ConfigError(f"share_prompts: a {kind} model reads a prompt differently for each completion; leave it out")
    if config.share_prompts is None:
        return dataclasses.replace(config, share_prompts=model.reads_branches)
    return config


def _with_router_coef(config: Any, model: ModelConfig) -> Any:
    """The model's own by default, 0 where it has no experts."""
    own, asked = model.experts.balance_coef if model.experts else 0.0, config.router_aux_loss_coef
    if asked is None:
        return dataclasses.replace(config, router_aux_loss_coef=own)
    if not 0 <= asked < math.inf:
        raise ConfigError(f"router_aux_loss_coef is {asked}; it must not be negative, and 0 is none")
    if asked and model.experts is None:
        kind = model.hf.get("model_type", "dense")
        raise ConfigError(f"router_aux_loss_coef is {asked}, but a {kind} model has no experts; leave it out")
    return config


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    default = type(config)()
    return {name: value for name, value in without_secrets(config).items() if value != getattr(default, name)}


def config_yaml(config: Any) -> str:
    """The resolved config as YAML that `--config` reads back, without secrets."""
    import yaml

    return yaml.safe_dump(without_secrets(config), sort_keys=True, allow_unicode=True)
