"""jaxpost: post-train language models in JAX. A checkpoint and a dataset go in, a post-trained checkpoint comes out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpost.generating import generate
    from jaxpost.methods import (
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
    from jaxpost.models.adapters import attach, merge_adapter, set_adapter, without_adapters
    from jaxpost.models.export import save_pretrained
    from jaxpost.models.lora_config import LoraConfig
    from jaxpost.models.peft import load_adapter, save_adapter
    from jaxpost.models.pretrained import from_pretrained
    from jaxpost.scoring import score
    from jaxpost.train.callbacks import TrainerCallback, TrainerControl, TrainerState
    from jaxpost.trainers import (
        BCOTrainer,
        CPOTrainer,
        DPOTrainer,
        GRPOTrainer,
        KTOTrainer,
        ORPOTrainer,
        PPOTrainer,
        RewardTrainer,
        RLOOTrainer,
        SFTTrainer,
    )

# Public name -> module; imported on first use, so that `import jaxpost` costs nothing.
_PUBLIC = {
    "from_pretrained": "jaxpost.models.pretrained",
    "save_pretrained": "jaxpost.models.export",
    **dict.fromkeys(["attach", "merge_adapter", "set_adapter", "without_adapters"], "jaxpost.models.adapters"),
    **dict.fromkeys(["load_adapter", "save_adapter"], "jaxpost.models.peft"),
    "generate": "jaxpost.generating",
    "score": "jaxpost.scoring",
    "LoraConfig": "jaxpost.models.lora_config",
    **dict.fromkeys(["TrainerCallback", "TrainerControl", "TrainerState"], "jaxpost.train.callbacks"),
    **dict.fromkeys(
        [
            f"{name}Config"
            for name in ("BCO", "CPO", "DPO", "GRPO", "KTO", "ORPO", "PPO", "RLOO", "Reward", "SFT", "SimPO")
        ],
        "jaxpost.methods",
    ),
    **dict.fromkeys(
        [f"{name}Trainer" for name in ("BCO", "CPO", "DPO", "GRPO", "KTO", "ORPO", "PPO", "RLOO", "Reward", "SFT")],
        "jaxpost.trainers",
    ),
}

__all__ = [
    "BCOConfig",
    "BCOTrainer",
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "LoraConfig",
    "ORPOConfig",
    "ORPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SimPOConfig",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "attach",
    "from_pretrained",
    "generate",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "save_pretrained",
    "score",
    "set_adapter",
    "without_adapters",
]

# What TRL has by a name of its own, and jaxpost in another way.
_ONE_CONFIG = "its flags are fields of SFTConfig and its kin; a script with flags is `jaxpost sft --config run.yaml`"
_ELSEWHERE = {
    **dict.fromkeys(["ModelConfig", "ScriptArguments", "TrlParser", "DatasetMixtureConfig"], _ONE_CONFIG),
    **dict.fromkeys(["get_peft_config", "get_quantization_config", "get_kbit_device_map"], _ONE_CONFIG),
    **dict.fromkeys(["clone_chat_template", "setup_chat_format"], "give chat_template_path in the config"),
    "create_reference_model": "leave ref_model out: it is what the run starts from",
    "DataCollatorForCompletionOnlyLM": "give rows with prompt and completion, or assistant_only_loss",
    "AutoModelForCausalLMWithValueHead": "PPOTrainer makes the value model; see value_model in PPOConfig",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise ImportError(f"jaxpost has no {name}: {_ELSEWHERE[name]}")
    if name == "__version__":
        from importlib.metadata import version

        return version("jaxpost")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxpost' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
