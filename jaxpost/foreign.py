"""Settings by the names that TRL, transformers and their kin give them: one table, for Python and the command line.

What means nothing here or is done anyway is accepted and left out; what is called otherwise is renamed; of the rest an
error says what to write.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import wraps
from numbers import Integral
from typing import Any, NamedTuple, TypeVar, dataclass_transform, get_args, get_origin

from jaxpost.errors import ConfigError
from jaxpost.options import nearest, option
from jaxpost.platform import platform

Class = TypeVar("Class", bound=type)
Fine = Callable[[Any], bool]


class Foreign(NamedTuple):
    """A setting that is no field.

    Attributes:
        is_fine: whether a value means nothing here, or what is done anyway.
        becomes: the fields that any other value stands for; None where it stands for none.
        instead: what an error says to write.
    """

    is_fine: Fine
    becomes: Callable[[Any], Mapping[str, Any]] | None = None
    instead: str = "leave it out"


def _any(value: Any) -> bool:
    return True


def _unset(value: Any) -> bool:
    """None, False, 0, "", {} or []."""
    return not value


def _unless(instead: str, is_fine: Fine = _unset) -> Foreign:
    return Foreign(is_fine, None, instead)


def _renamed(name: str) -> Foreign:
    return Foreign(lambda value: False, lambda value: {name: value})


def _one_of(*values: Any) -> Fine:
    return lambda value: value is None or value in values


def _is_usual_fsdp(value: Any) -> bool:
    """Whether it asks for what the axis fsdp does."""
    words = value if isinstance(value, list) else str(value).split()
    return not value or set(words) <= {"full_shard", "auto_wrap", "True"}


def _dtype(value: Any) -> Mapping[str, Any]:
    return {"dtype": str(value).removeprefix("torch.")}


def _model_init(given: Any) -> Mapping[str, Any]:
    """The keys of model_init_kwargs, where they have names of their own."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"model_init_kwargs is {given!r}; give a mapping")
    return {"model_revision" if name == "revision" else name: value for name, value in given.items()}


_ON_CPU = "set JAX_PLATFORMS=cpu, or leave it out"
_ITS_OWN_NAMES = "give temperature, top_k, top_p, min_p and repetition_penalty by their own names"
_MESH = "give mesh: by default all devices are on its axis fsdp, which splits parameters, gradients and optimizer"
_LENGTHS = "prompts are not cut: give max_length and truncation_mode, and on_long_row says what becomes of longer rows"

# How PyTorch, its loaders, its kernels and vLLM go about it.
_NOTHING_HERE = """
    average_tokens_across_devices batch_eval_metrics bnb_4bit_compute_dtype bnb_4bit_quant_storage cache_implementation
    cast_lm_head_to_fp32 dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_batch_size dataset_num_proc
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
    device_map do_eval do_predict do_train eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
    full_determinism gradient_checkpointing_kwargs hub_always_push ignore_bias_buffers include_num_input_tokens_seen
    label_pad_token_id length_column_name liger_kernel_config local_rank local_rollout_forward_batch_size log_level
    log_level_replica log_multimodal log_on_each_node log_unique_prompts logging_dir logging_nan_inf_filter
    lora_task_type low_cpu_mem_usage num_sample_generations padding_value prediction_loss_only remove_unused_columns
    restore_callback_states_from_checkpoint save_on_each_node save_safetensors shuffle_dataset skip_memory_metrics tf32
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    transformers_continuous_batching_config use_cache use_liger_kernel use_liger_loss use_logits_to_keep
    use_transformers_continuous_batching use_transformers_paged use_vllm vllm_device vllm_enable_sleep_mode
    vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_max_model_length vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_tensor_parallel_size
""".split()  # noqa: SIM905 -- a list would be eighty lines

FOREIGN: dict[str, Foreign] = {
    **dict.fromkeys(_NOTHING_HERE, Foreign(_any)),
    # Called otherwise.
    "torch_dtype": Foreign(lambda value: value is None, _dtype),
    "model_init_kwargs": Foreign(_unset, _model_init),
    "evaluation_strategy": _renamed("eval_strategy"),
    "max_seq_length": _renamed("max_length"),
    "response_length": _renamed("max_completion_length"),
    "max_new_tokens": _renamed("max_completion_length"),
    "ds3_gather_for_generation": _renamed("gather_for_generation"),
    "sft_model_path": _renamed("model_name_or_path"),
    "exp_name": _renamed("run_name"),
    "group_by_length": Foreign(_unset, lambda value: {"train_sampling_strategy": "group_by_length"}),
    "activation_offloading": Foreign(_unset, lambda value: {"remat_policy": "offload"}),
    # Numbers and devices.
    "fp16": _unless("there is no mixed precision in float16: give bf16=True, or dtype='float16' for all of it"),
    "fp16_full_eval": _unless("evaluation computes as training does: give bf16=True"),
    "bf16_full_eval": _unless("evaluation computes as training does: give bf16=True"),
    **dict.fromkeys(["use_cpu", "no_cuda"], _unless(_ON_CPU, lambda value: not value or platform() == "cpu")),
    "deepspeed": _unless(f"leave it out, and {_MESH} as ZeRO-3 does; offload_optimizer keeps the latter on the host"),
    "fsdp": _unless(_MESH, _is_usual_fsdp),
    "fsdp_config": _unless(_MESH),
    "parallelism_config": _unless("give mesh, e.g. mesh='fsdp=4,context=2'"),
    "accelerator_config": _unless("leave it out; mesh says where rows and parameters are"),
    "auto_find_batch_size": _unless("leave it out; `jaxpost plan METHOD --fit` finds a batch size"),
    "activation_checkpointing": _unless("give gradient_checkpointing, and remat_policy"),
    "activation_checkpointing_kwargs": _unless("give remat_policy"),
    "vllm_mode": _unless("completions are sampled by the run itself, on all of its devices", _one_of("colocate")),
    "vllm_structured_outputs_regex": _unless("completions cannot be held to a pattern; reward those that fit it"),
    "trust_remote_code": _unless("code that comes with a model is never run; README names the families there are"),
    "quantization_config": _unless("give load_in_4bit=True or load_in_8bit=True, with use_peft=True"),
    # The run.
    "overwrite_output_dir": _unless("the run in output_dir is continued if it is the same: give another output_dir"),
    "ignore_data_skip": _unless("a run that goes on reads the rows that are left"),
    "save_only_model": _unless("a checkpoint is a whole one; give save_strategy='no' for the model alone"),
    "enable_jit_checkpoint": _unless("SIGTERM saves a checkpoint anyway"),
    "dataloader_drop_last": _unless("no row is left out; the last step of an epoch has fewer"),
    "logging_strategy": _unless("give logging_steps", _one_of("steps")),
    "eval_delay": _unless("give eval_steps; or evaluate what is saved, with `jaxpost evaluate`"),
    "include_for_metrics": _unless("compute_metrics is given rewards and labels"),
    "label_names": _unless("rows say what is trained by their columns"),
    "project": _unless("set WANDB_PROJECT or TRACKIO_PROJECT", _one_of("huggingface")),
    **dict.fromkeys(
        ["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"], _unless("set it up with trackio itself")
    ),
    "hub_revision": _unless("push_to_hub(revision=...) in Python takes one"),
    "debug": _unless("leave it out"),
    "total_episodes": _unless("give max_steps or num_train_epochs"),
    # Training.
    "optim_args": _unless("give adam_beta1, adam_beta2, adam_epsilon and weight_decay by their own names"),
    "optim_target_modules": _unless("the optimizers of low-rank projections are not there; use_peft trains adapters"),
    "label_smoothing_factor": _unless("there is none in this loss; dpo and cpo have label_smoothing"),
    "neftune_noise_alpha": _unless("noise in the embeddings is not there"),
    "rpo_alpha": _unless("give loss_type=['sigmoid', 'sft'] with loss_weights=[1.0, rpo_alpha]"),
    "lora_target_parameters": _unless("in Python give peft_config=LoraConfig(target_parameters=...)"),
    "is_encoder_decoder": _unless("models with an encoder are not there"),
    **dict.fromkeys(["model_adapter_name", "ref_adapter_name"], _unless("give ref_model")),
    **dict.fromkeys(["max_prompt_length", "max_target_length"], _unless(_LENGTHS)),
    "max_completion_length": _unless(_LENGTHS),  # of what does not sample
    "dataset_kwargs": _unless("rows with input_ids are taken as they are; packing and eos_token are flags"),
    "chat_template_kwargs": _unless("give each row a column chat_template_kwargs"),
    "generate_during_eval": _unless("leave it out; `jaxpost generate` completes prompts with what is saved"),
    # Sampling.
    "generation_kwargs": _unless(_ITS_OWN_NAMES),
    "stop_token": _unless("completions end at the model's end tokens; eos_token sets one", _one_of("eos")),
    "stop_token_id": _unless("completions end at the model's end tokens; eos_token sets one", lambda v: v is None),
    "max_tool_calling_iterations": _unless("tools are called by a rollout_func"),
    "log_completions_hub_repo": _unless("completions/ in output_dir has them"),
}

# Values of fields by their names elsewhere.
_KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "flex_attention")
VALUES: dict[str, dict[Any, Any]] = {
    "attn_implementation": {**dict.fromkeys(_KERNELS, "auto"), None: "auto", "eager": "xla"},
    "scale_rewards": {True: "group", False: "none"},
    "report_to": {"all": ["tensorboard"], None: ["none"]},
}


def settled(given: Mapping[str, Any], config: type[Any]) -> dict[str, Any]:
    """What is given, in fields of a config.

    Raises:
        ConfigError: a name is neither a field nor in the table, or a value in the table has no counterpart.
    """
    kinds = {field.name: field.type for field in fields(config)}
    taken: dict[str, Any] = {}
    waiting = list(given.items())
    while waiting:
        name, value = waiting.pop(0)
        value = value.value if isinstance(value, Enum) else value
        if name in kinds:
            if name in taken:
                raise ConfigError(f"{name} is given by two names; leave one out")
            taken[name] = _fitting(name, value, kinds[name])
            _check_kind(name, taken[name], kinds[name])
            continue
        if name not in FOREIGN:
            hint = nearest(name, [*kinds, *FOREIGN])
            raise ConfigError(f"{config.__name__} has no {name!r}{hint}")
        setting = FOREIGN[name]
        if setting.is_fine(value):
            continue
        if setting.becomes is None:
            raise ConfigError(f"{name} is {value!r:.80}: {setting.instead}")
        waiting = [*setting.becomes(value).items(), *waiting]
    return taken


def _fitting(name: str, value: Any, kind: Any) -> Any:
    """A value under its name here; one text where there may be several is a list of one."""
    if value is None or isinstance(value, str | bool):
        value = VALUES.get(name, {}).get(value, value)
    takes_list = any(get_origin(each) is list for each in (kind, *get_args(kind)))
    return [value] if isinstance(value, str) and takes_list else value


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse what would count as another value than was meant: a text as a switch, a part of a number of things."""
    kinds = get_args(kind) or (kind,)
    if value is None or isinstance(value, Integral):
        return
    if bool in kinds:
        raise ConfigError(f"{name} is {value!r}; give True or False")
    if int in kinds and not {float, str} & {*kinds}:
        raise ConfigError(f"{name} is {value!r}; give a whole number")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def user_config(declared: Class) -> Class:
    """A frozen dataclass of options that users make: `output_dir` may come first, and settings may be foreign ones."""
    made: Any = dataclass(frozen=True, kw_only=True)(declared)
    init = made.__init__

    @wraps(init)
    def __init__(self: Any, output_dir: Any = None, **given: Any) -> None:
        if output_dir is not None:
            given["output_dir"] = str(output_dir)
        init(self, **settled(given, type(self)))

    made.__init__ = __init__
    return made


def settled_words(words: Sequence[str], config: type[Any]) -> list[str]:
    """The words of a command line in which settings that are no fields are settled.

    Raises:
        ConfigError: as `settled`.
    """
    import yaml

    known = {field.name for field in fields(config)}
    rest: list[str] = []
    position = 0
    while position < len(words):
        name, equals, value = words[position].removeprefix("--").partition("=")
        name, position = name.replace("-", "_"), position + 1
        if not words[position - 1].startswith("--") or name in known or name not in FOREIGN:
            rest.append(words[position - 1])
            continue
        values = [value] if equals else []
        while not equals and position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        given = yaml.safe_load(" ".join(values)) if values else True
        for field, value in settled({name: given}, config).items():
            rest += [f"--{field}", *map(_word, value if isinstance(value, list) else [value])]
    return rest


def _word(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
