"""Callbacks of runs: transformers' own, and a run that one has ended and that goes on, bit for bit."""

import json

import pytest
from safetensors.numpy import load_file

from jaxpost import SFTConfig, SFTTrainer, TrainerCallback
from tests.e2e.test_lora import assert_same

ROWS = [{"text": f"number {n} " * (1 + n % 3)} for n in range(32)]


def trainer(model, out, callbacks=(), **options):
    shared = {"max_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 1, "learning_rate": 1e-2}
    args = SFTConfig(out, **{**shared, "save_steps": 3, "report_to": "none", **options})
    return SFTTrainer(str(model), args, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=callbacks)


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """A run without callbacks."""
    out = tmp_path_factory.mktemp("plain") / "out"
    trainer(tiny_folder, out).train()
    return out


def logged(out, *names):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [[row[name] for name in names] for row in rows if names[-1] in row]


class Halt(TrainerCallback):
    """Ends a run at step 2, and notes what it sees."""

    def __init__(self):
        self.events = []

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = control.should_training_stop or state.global_step == 2

    def on_save(self, args, state, control, processing_class, **others):
        self.events.append((state.global_step, processing_class.eos_token, args.learning_rate))

    def on_train_end(self, args, state, control, model, **others):
        self.events.append((state.global_step, model.config.vocab_size, len(state.log_history)))


def test_a_run_that_was_ended_goes_on_to_the_same_bits(plain, tiny_folder, tmp_path):
    halt = Halt()
    run = trainer(tiny_folder, tmp_path / "out", [halt])
    assert run.train().global_step == 2 and run.state.max_steps == 4
    assert halt.events == [(2, "<|im_end|>", 1e-2), (2, 320, 2)]
    again = trainer(tiny_folder, tmp_path / "out", [Halt])
    assert again.train().global_step == 2  # it has been ended
    whole = trainer(tiny_folder, tmp_path / "out", [TrainerCallback()], resume_with_changes=True)
    assert whole.train().global_step == 4
    assert [row["step"] for row in whole.state.log_history] == [1, 2, 3, 4]
    names = ("step", "loss", "grad_norm", "num_tokens")
    assert logged(tmp_path / "out", *names) == logged(plain, *names)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load_file(plain / "model.safetensors"))


def test_early_stopping_of_transformers_ends_with_the_best(tiny_folder, tmp_path):
    from transformers import EarlyStoppingCallback

    patience = EarlyStoppingCallback(early_stopping_patience=2)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    worst = {"metric_for_best_model": "loss", "greater_is_better": True}  # of a loss that falls
    run = trainer(tiny_folder, tmp_path / "out", [patience], max_steps=6, **options, **worst)
    result = run.train()
    losses = [loss for _, loss in logged(tmp_path / "out", "step", "eval_loss")]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert run.state.global_step == 3 and patience.early_stopping_patience_counter == 2
    assert (run.state.best_metric, run.state.best_global_step) == (losses[0], 1)
    assert result["eval_loss"] == losses[0] == run.evaluate()["eval_loss"]


def test_a_callback_can_evaluate_a_run_that_does_not(tiny_folder, tmp_path):
    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            control.should_evaluate = state.global_step == 1

    run = trainer(tiny_folder, tmp_path / "out", [Once], max_steps=2, save_strategy="no")
    assert run.train()["eval_loss"] > 0
    assert [step for step, _ in logged(tmp_path / "out", "step", "eval_loss")] == [1]
