"""Scripts as TRL's users write them: only the import line is changed, and models are given by name."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxpost import save_pretrained
from tests.conftest import make_model, make_tokenizer

PAIRS = """
pairs = Dataset.from_list(
    [{"prompt": f"Say {n}.", "chosen": "yes" * (1 + n % 3), "rejected": "no, " * (1 + n % 4)} for n in range(32)]
)
"""
PROMPTS = """
prompts = Dataset.from_list([{"prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(32)])


def brevity(completions, answer, **kwargs):
    return [-float(len(text)) + (true in text) for text, true in zip(completions, answer)]
"""
SHARED = """
shared = dict(
    output_dir=OUT, max_steps=2, per_device_train_batch_size=1, logging_steps=1, save_strategy="no", report_to="none",
    learning_rate=1e-3, bf16=False, use_cpu=True, dataloader_num_workers=0, gradient_checkpointing=False,
)
"""
SCRIPTS = {
    "sft": """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

rows = Dataset.from_list(
    [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(32)]
)
trainer = SFTTrainer(
    model=MODEL,
    args=SFTConfig(**shared, max_length=64, dataset_num_proc=1, eval_strategy="no"),
    train_dataset=rows,
    eval_dataset=rows.select(range(8)),
)
result = trainer.train()
print(result.metrics["train_loss"], result.training_loss)
print(trainer.evaluate()["eval_loss"])
trainer.save_model(OUT + "/last")
""",
    "sft with lora": """
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
trainer = SFTTrainer(
    MODEL,
    args=SFTConfig(**shared, packing=True, max_length=64, padding_free=False),
    train_dataset=Dataset.from_dict({"text": ["some text to learn from " * 3] * 40}),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM"),
)
result = trainer.train()
""",
    "dpo": """
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Stop(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "rewards/margins" in logs and state.is_world_process_zero:
            print(state.global_step, state.epoch, logs["loss"])


trainer = DPOTrainer(
    model=MODEL,
    args=DPOConfig(**shared, beta=0.1, loss_type="sigmoid"),
    train_dataset=pairs,
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    callbacks=[Stop()],
)
result = trainer.train()
assert trainer.state.log_history[0]["loss"] > 0 and trainer.state.global_step == 2
""",
    "orpo": """
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

trainer = ORPOTrainer(
    model=MODEL,
    args=ORPOConfig(**shared, beta=0.1, max_length=64),
    train_dataset=pairs,
    processing_class=AutoTokenizer.from_pretrained(MODEL),
)
result = trainer.train()
""",
    "cpo": """
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

trainer = CPOTrainer(
    model=MODEL,
    args=CPOConfig(**shared, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, max_length=64),
    train_dataset=pairs,
    processing_class=AutoTokenizer.from_pretrained(MODEL),
)
result = trainer.train()
""",
    "kto": """
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

rows = Dataset.from_list(
    [{"prompt": "Well?", "completion": "yes" * (1 + n % 3), "label": n % 2 == 0} for n in range(32)]
)
shared["per_device_train_batch_size"] = 2
trainer = KTOTrainer(
    model=MODEL, args=KTOConfig(**shared, desirable_weight=1.0, undesirable_weight=1.0), train_dataset=rows
)
result = trainer.train()
""",
    "reward": """
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

trainer = RewardTrainer(model=MODEL, args=RewardConfig(**shared, max_length=64), train_dataset=pairs)
result = trainer.train()
trainer.save_model(OUT + "/judge")
""",
    "grpo": """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

shared["per_device_train_batch_size"] = 4
trainer = GRPOTrainer(
    model=MODEL,
    reward_funcs=brevity,
    args=GRPOConfig(**shared, num_generations=4, max_completion_length=8, use_vllm=False, beta=0.0),
    train_dataset=prompts,
)
result = trainer.train()
""",
    "rloo": """
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

shared["per_device_train_batch_size"] = 4
trainer = RLOOTrainer(
    model=MODEL,
    reward_funcs=[brevity],
    args=RLOOConfig(**shared, num_generations=2, max_completion_length=8, beta=0.05),
    train_dataset=prompts,
)
result = trainer.train()
""",
    "ppo": """
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

trainer = PPOTrainer(
    args=PPOConfig(**shared, num_ppo_epochs=1, num_mini_batches=1, response_length=8, missing_eos_penalty=1.0),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    model=MODEL,
    ref_model=None,
    reward_model=JUDGE,
    value_model=JUDGE,
    train_dataset=prompts,
)
result = trainer.train()
""",
}
BY_TRL = ("sft", "sft with lora", "dpo", "orpo", "cpo", "kto", "reward", "grpo", "rloo")  # 1.16 has no PPO


def script(name, tmp_path, model, judge=""):
    """The script with its data and what it is to write."""
    body = SCRIPTS[name]
    lines = body.strip().splitlines()
    imports = [line for line in lines if re.match(r"from \S+ import", line)]
    names = f"MODEL, JUDGE, OUT = {str(model)!r}, {str(judge)!r}, {str(tmp_path / 'out')!r}"
    rest = [line for line in lines if line not in imports]
    return "\n".join([*imports, names, PAIRS, PROMPTS, SHARED, *rest])


def ported(text):
    """With the import line changed, and nothing else."""
    assert len(re.findall(r"from trl\S* import", text)) == 1
    return re.sub(r"from trl\S* import", "from jaxpost import", text)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    save_pretrained(make_model(head="reward"), make_tokenizer(), folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_with_the_import_line_changed(name, tiny_folder, judge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    exec(compile(ported(script(name, tmp_path, tiny_folder, judge)), f"{name}.py", "exec"), space)
    result, trainer = space["result"], space["trainer"]
    assert result.global_step == trainer.state.global_step == 2
    assert np.isfinite(result.training_loss) and result["loss"] == trainer.state.log_history[1]["loss"]
    assert result.metrics.keys() >= {"train_loss", "train_runtime", "train_steps_per_second", "epoch"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter_model.safetensors" if "lora" in name else "model.safetensors") in written
    if name == "sft":
        assert (tmp_path / "out" / "last" / "model.safetensors").exists()


@pytest.mark.parity
@pytest.mark.parametrize("name", BY_TRL)
def test_the_script_is_one_that_trl_runs(name, tiny_folder, tmp_path):
    (tmp_path / "script.py").write_text(script(name, tmp_path, tiny_folder))
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
