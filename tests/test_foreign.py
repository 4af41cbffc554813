"""Settings by TRL's and transformers' names, in Python and on the command line."""

import dataclasses
import inspect
import re
from enum import StrEnum
from pathlib import Path

import pytest

from jaxpost import DPOConfig, GRPOConfig, PPOConfig, SFTConfig
from jaxpost.cli import parse
from jaxpost.errors import ConfigError
from jaxpost.foreign import FOREIGN, settled_words
from jaxpost.methods import METHODS

HARMLESS = {
    "fp16": False,
    "deepspeed": None,
    "fsdp": "full_shard auto_wrap",
    "dataloader_num_workers": 4,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "use_liger_kernel": True,
    "dataset_num_proc": 8,
    "remove_unused_columns": False,
    "save_safetensors": True,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "ddp_find_unused_parameters": False,
    "logging_strategy": "steps",
    "use_cpu": True,
    "trust_remote_code": False,
    "max_prompt_length": None,
    "model_init_kwargs": {"device_map": "auto"},
}
REFUSED = {
    "fp16": (True, "give bf16=True, or dtype='float16'"),
    "deepspeed": ("zero3.json", "give mesh: by default all devices are on its axis fsdp"),
    "fsdp": ("full_shard offload", "give mesh"),
    "neftune_noise_alpha": (5.0, "noise in the embeddings is not there"),
    "trust_remote_code": (True, "never run"),
    "max_prompt_length": (128, "give max_length and truncation_mode"),
    "overwrite_output_dir": (True, "give another output_dir"),
    "eval_delay": (3, "give eval_steps"),
    "auto_find_batch_size": (True, "jaxpost plan METHOD --fit"),
    "generation_kwargs": ({"top_k": 3}, "by their own names"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_means_nothing_here_is_accepted_and_changes_nothing(name):
    assert SFTConfig(**{name: HARMLESS[name]}) == SFTConfig()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_mean_something_says_what_to_write_instead(name):
    value, instead = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        SFTConfig(**{name: value})
    text = str(error.value)
    assert text.startswith(f"{name} is ") and instead in text and "\n" not in text


class Strategy(StrEnum):
    EPOCH = "epoch"


@pytest.mark.parametrize(
    ("kind", "given", "field", "value"),
    [
        (SFTConfig, {"max_seq_length": 64}, "max_length", 64),
        (SFTConfig, {"evaluation_strategy": "steps"}, "eval_strategy", "steps"),
        (SFTConfig, {"save_strategy": Strategy.EPOCH}, "save_strategy", "epoch"),
        (SFTConfig, {"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
        (SFTConfig, {"model_init_kwargs": {"torch_dtype": "torch.bfloat16"}}, "dtype", "bfloat16"),
        (SFTConfig, {"model_init_kwargs": {"revision": "v2"}}, "model_revision", "v2"),
        (SFTConfig, {"attn_implementation": "flash_attention_2"}, "attn_implementation", "auto"),
        (SFTConfig, {"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        (SFTConfig, {"activation_offloading": True}, "remat_policy", "offload"),
        (SFTConfig, {"report_to": "none"}, "report_to", ["none"]),
        (SFTConfig, {"lora_target_modules": "all-linear"}, "lora_target_modules", ["all-linear"]),
        (DPOConfig, {"loss_type": "sigmoid"}, "loss_type", ["sigmoid"]),
        (GRPOConfig, {"scale_rewards": False}, "scale_rewards", "none"),
        (GRPOConfig, {"ds3_gather_for_generation": False}, "gather_for_generation", False),
        (PPOConfig, {"response_length": 53}, "max_completion_length", 53),
    ],
)
def test_other_names_of_fields_and_values(kind, given, field, value):
    assert getattr(kind(**given), field) == value


def test_output_dir_may_come_first_and_the_signature_is_that_of_the_fields():
    assert SFTConfig("out").output_dir == "out"
    assert "learning_rate" in inspect.signature(SFTConfig).parameters
    again = dataclasses.replace(SFTConfig("out"), max_length=3)
    assert (again.output_dir, again.max_length) == ("out", 3)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match=r"SFTConfig has no 'learning_rat' \(did you mean 'learning_rate'\?\)"):
        SFTConfig(learning_rat=1.0)
    with pytest.raises(ConfigError, match=r"DPOConfig has no 'packing'"):
        DPOConfig(packing=True)
    with pytest.raises(ConfigError, match="max_length is given by two names"):
        SFTConfig(max_length=5, max_seq_length=5)


def test_the_command_line_takes_the_same(tmp_path):
    flags = "--dataloader_num_workers 4 --use_vllm --max_seq_length 64 --fsdp full_shard auto_wrap --fp16=false"
    assert parse(SFTConfig, "sft", flags.split()) == SFTConfig(max_length=64)
    file = tmp_path / "run.yaml"
    file.write_text(
        "fp16: no\nmax_seq_length: null\nmodel_init_kwargs: {torch_dtype: bfloat16}\nuse_liger_kernel: yes\n"
    )
    assert parse(SFTConfig, "sft", ["--config", str(file)]) == SFTConfig(max_length=None, dtype="bfloat16")
    for flag in ("--fp16", "--neftune_noise_alpha 5", "--deepspeed zero3.json"):
        with pytest.raises(ConfigError, match=flag.split()[0].strip("-")):
            parse(SFTConfig, "sft", flag.split())
    with pytest.raises(ConfigError, match="unknown flag --dataloader_num_worker"):
        parse(SFTConfig, "sft", ["--dataloader_num_worker", "4"])
    assert settled_words(["--max_completion_length", "8"], GRPOConfig) == ["--max_completion_length", "8"]


def test_the_table_holds_no_field_of_all_methods_and_renames_to_fields():
    names = [{field.name for field in dataclasses.fields(method.config)} for method in METHODS.values()]
    assert not FOREIGN.keys() & set.intersection(*names)
    for setting in FOREIGN.values():
        if setting.becomes is not None:
            given = setting.becomes({"revision": "x"})
            assert any(given.keys() <= known for known in names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_every_argument_of_trls_config_is_a_field_or_in_the_table(method):
    kind = trl_config(method)
    ours = {field.name for field in dataclasses.fields(METHODS[method].config)}
    assert not {field.name for field in dataclasses.fields(kind)} - ours - FOREIGN.keys()


def trl_config(method):
    import trl

    if method in ("orpo", "cpo", "simpo"):
        from trl.experimental import cpo, orpo

        return orpo.ORPOConfig if method == "orpo" else cpo.CPOConfig
    if method in ("bco", "ppo"):
        pytest.skip("this TRL has none")
    names = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}
    return getattr(trl, f"{names[method]}Config")


def test_the_table_of_the_documentation_names_flags_that_are_there():
    text = (Path(__file__).parent.parent / "docs" / "from_trl.md").read_text()
    known = {field.name for method in METHODS.values() for field in dataclasses.fields(method.config)}
    here = "\n".join(line.rsplit("|", 2)[1] for line in text.splitlines() if line.startswith("|"))
    flags = set(re.findall(r"--(\w+)", here)) - {"config"}
    assert len(flags) > 50 and not flags - known
