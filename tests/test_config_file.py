"""A config that is printed is the config that is read."""

import pytest

from jaxpost.cli import COMMANDS, parse
from jaxpost.commands import Trains
from jaxpost.config_file import annotated
from jaxpost.methods import METHODS

COMMON = {
    "learning_rate": 3e-7,
    "report_to": ["none"],
    "max_grad_norm": None,
    "warmup_steps": 0.1,
    "padding_free": False,
    "run_name": "a: b # c",
    "tokenized_cache_dir": "",
    "lora_target_modules": ["q_proj", "v_proj"],
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    "phase_timeouts": {"train": 60},
    "datasets": [{"path": "a.jsonl", "weight": 2}, {"path": "b: c.jsonl"}],
}
OWN = {
    "dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
    "rloo": {"reward_clip_range": [-1.0, 1.0], "reward_funcs": ["r.py:f", "length_reward(most=3)"]},
    "sft": {"max_length": None, "completion_only_loss": True},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_printed_reads_back(name, tmp_path):
    file = tmp_path / "run.yaml"
    for changed in ({}, COMMON | OWN.get(name, {})):
        config = METHODS[name].config(**changed)
        file.write_text(annotated(config, name))
        assert parse(METHODS[name].config, name, ["--config", str(file)]) == config


def test_every_method_is_a_command_that_trains():
    assert {name for name, command in COMMANDS.items() if isinstance(command, Trains)} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_what_was_changed_is_marked_and_nothing_else(name):
    config = METHODS[name].config(learning_rate=0.5, report_to=["none"], max_grad_norm=None)
    lines = annotated(config, name).splitlines()
    marked = [line for line in lines if "# default:" in line]
    assert sorted(line.split("  # ")[0] for line in marked) == [
        "learning_rate: 0.5",
        "max_grad_norm: null",
        "report_to: [none]",
    ]
    assert "report_to: [none]  # default: tensorboard" in lines
    assert not any("# default:" in line for line in annotated(METHODS[name].config(), name).splitlines())


def test_entries_stand_under_the_headings_of_help():
    text = annotated(METHODS["dpo"].config(), "dpo")
    assert text.index("# Flags of this command\nbeta: 0.1") < text.index("# Reference model") < text.index("# Model")
    assert text.index("# Optimisation") < text.index("\nlearning_rate:") < text.index("# Evaluation")


def test_several_lines_have_the_default_above_them():
    config = METHODS["sft"].config(run_name="one\ntwo")
    assert "# default: null\nrun_name:" in annotated(config, "sft")
