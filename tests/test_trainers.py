"""The trainers by TRL's names: what they give, and what they say of arguments that mean nothing here."""

import inspect
import json

import pytest

from jaxpost import DPOTrainer, GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from jaxpost.errors import ConfigError
from tests.conftest import make_tokenizer


def test_a_trained_trainer_is_what_trls_users_expect(tiny_folder, tmp_path):
    rows = [{"text": f"number {n}"} for n in range(16)]
    args = SFTConfig(tmp_path / "out", max_steps=2, per_device_train_batch_size=1, logging_steps=1, report_to="none")
    trainer = SFTTrainer(str(tiny_folder), args, train_dataset=rows, eval_dataset=rows[:4], tokenizer=make_tokenizer())
    assert trainer.state.max_steps == 2 and trainer.state.log_history == []
    result = trainer.train()
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert trainer.state.log_history == logged and result == {**logged[0], **logged[1]}
    assert result.training_loss == pytest.approx((logged[0]["loss"] + logged[1]["loss"]) / 2)
    assert trainer.processing_class.eos_token == "<|im_end|>" and trainer.model.config.vocab_size == 320
    trainer.save_metrics("eval", trainer.evaluate())
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 0


def no_torch(name, **options):
    """A model of transformers', untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes))
    model.name_or_path = name
    return model


@pytest.mark.parity
def test_a_model_of_torch_is_refused_with_its_name(tiny_folder):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8
    wrong = r"model is transformers's LlamaForCausalLM; give its name or folder: model='Qwen/Qwen3-0.6B'"
    with pytest.raises(ConfigError, match=wrong):
        SFTTrainer(no_torch("Qwen/Qwen3-0.6B"), train_dataset=rows)
    with pytest.raises(ConfigError, match="ref_model is transformers's LlamaForCausalLM; give its name or folder, or"):
        DPOTrainer(str(tiny_folder), no_torch(""), train_dataset=rows)
    args = GRPOConfig(per_device_train_batch_size=1, max_completion_length=8)
    with pytest.raises(ConfigError, match="reward_funcs is transformers's LlamaForCausalLM"):
        GRPOTrainer(str(tiny_folder), no_torch("x"), args, train_dataset=[{"prompt": "a"}] * 8)


def test_what_is_not_there_says_what_to_write(tiny_folder):
    rows, model = [{"text": "abc"}] * 8, str(tiny_folder)
    with pytest.raises(ConfigError, match="data_collator is not there: batches are made of rows"):
        SFTTrainer(model, None, rows)
    with pytest.raises(ConfigError, match=r"SFTTrainer has no argument 'train_datset' \(did you mean 'train_dataset'"):
        SFTTrainer(model, train_datset=rows)
    with pytest.raises(ConfigError, match="max_seq_length is not there: give max_length in args"):
        SFTTrainer(model, train_dataset=rows, max_seq_length=64)
    with pytest.raises(ConfigError, match=r"args is a jaxpost\.methods\.GRPOConfig; give a jaxpost\.SFTConfig"):
        SFTTrainer(model, GRPOConfig(), train_dataset=rows)
    with pytest.raises(ConfigError, match="compute_metrics is given the reward of every example, but sft has no"):
        SFTTrainer(model, train_dataset=rows, compute_metrics=lambda prediction: {})
    with pytest.raises(ConfigError, match="compute_metrics is given the reward of every example, but grpo"):
        GRPOTrainer(model, len, train_dataset=[{"prompt": "a"}] * 8, compute_metrics=lambda prediction: {})
    with pytest.raises(ConfigError, match="model is builtins's int"):
        SFTTrainer(3, train_dataset=rows)
    with pytest.raises(ConfigError, match="give the arguments after processing_class by name"):
        SFTTrainer(model, None, None, rows, rows, None, None)
    with pytest.raises(ConfigError, match="SFTTrainer is a function: subclasses of it would change nothing"):
        exec("class Mine(SFTTrainer): pass", {"SFTTrainer": SFTTrainer})
    with pytest.raises(ConfigError, match="reward_model"):
        PPOTrainer(PPOConfig(max_completion_length=8), model=model, reward_model=3, train_dataset=[{"prompt": "a"}] * 8)


def test_what_trl_has_in_another_place_says_where_it_is():
    with pytest.raises(ImportError, match="jaxpost has no TrlParser: its flags are fields of SFTConfig"):
        exec("from jaxpost import TrlParser")
    with pytest.raises(ImportError, match="cannot import name 'Trainer'"):
        exec("from jaxpost import Trainer")


def test_signatures_say_all_that_is_taken_in_trls_order():
    names = list(inspect.signature(SFTTrainer).parameters)
    assert names[:6] == ["model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"]
    assert set(names[6:]) == {"tokenizer", "peft_config", "callbacks", "compute_metrics", "formatting_func"}
    assert list(inspect.signature(DPOTrainer).parameters)[:3] == ["model", "ref_model", "args"]
    assert "rollout_func" in inspect.signature(GRPOTrainer).parameters


@pytest.mark.parity
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO"])
def test_every_argument_of_trls_trainer_is_taken_or_in_the_table(name):
    import trl

    import jaxpost
    from jaxpost.trainers import INSTEAD

    theirs = list(inspect.signature(getattr(trl, f"{name}Trainer")).parameters)
    ours = list(inspect.signature(getattr(jaxpost, f"{name}Trainer")).parameters)
    assert ours[:6] == theirs[:6] and not set(theirs) - set(ours) - INSTEAD.keys()
