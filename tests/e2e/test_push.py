"""Pushing to a hub that is not there: what is uploaded, when, and that the token stays out of sight."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from jaxpost import SFTConfig, SFTTrainer
from jaxpost.cli import main
from jaxpost.errors import ConfigError, HubError

TOKEN = "hf_never_to_be_seen"


class Hub:
    """In the place of huggingface_hub.HfApi."""

    def __init__(self):
        self.calls, self.fault = [], None

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, *, private, exist_ok, repo_type):
        self.calls.append(("create", repo_id, private, self.token))
        if self.fault:
            raise self.fault
        return type("Url", (), {"repo_id": repo_id if "/" in repo_id else f"someone/{repo_id}"})

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        files = [str(path.relative_to(folder_path)) for path in sorted(Path(folder_path).rglob("*")) if path.is_file()]
        kept = list(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        self.calls.append(("upload", repo_id, kept, commit_message, revision))
        return "commit"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def command(model, tmp_path, *flags):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(16)))
    words = f"sft --model_name_or_path {model} --dataset_name {rows} --output_dir {tmp_path / 'run'} --max_steps 1"
    return main([*words.split(), "--per_device_train_batch_size", "1", *flags])


def test_a_run_is_pushed_when_it_ends_without_its_token(hub, tiny_folder, tmp_path, capsys):
    flags = ["--push_to_hub", "--hub_model_id", "someone/tiny", "--hub_private_repo", "--hub_token", TOKEN]
    assert command(tiny_folder, tmp_path, *flags) == 0
    (made, uploaded) = hub.calls
    assert made == ("create", "someone/tiny", True, TOKEN)
    assert uploaded[:2] == ("upload", "someone/tiny") and uploaded[3:] == ("End of training", None)
    assert {"model.safetensors", "README.md", "config.json", "metrics.jsonl", "config.yaml"} <= set(uploaded[2])
    assert not [name for name in uploaded[2] if name.startswith(("checkpoints", "runs", "."))]
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert "push_to_hub: true" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_hub_that_refuses_is_one_line_before_the_first_step(hub, tiny_folder, tmp_path, capsys):
    hub.fault = OSError(f"401 for {TOKEN}\nlog in")
    assert command(tiny_folder, tmp_path, "--push_to_hub", "--hub_token", TOKEN) == 78
    error = capsys.readouterr().err
    assert error.startswith("jaxpost: the repository run on the Hub cannot be made; log in with `hf auth login`")
    assert error.endswith("(401 for *** log in)\n") and error.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_python_pushes_what_the_model_is_now(hub, tiny_folder, tmp_path):
    args = SFTConfig(tmp_path / "mine", per_device_train_batch_size=1, max_steps=1, report_to="none", hub_token=TOKEN)
    assert TOKEN not in repr(args)
    trainer = SFTTrainer(str(tiny_folder), args, train_dataset=[{"text": f"number {n}"} for n in range(16)])
    assert trainer.push_to_hub("First", revision="side", token="other") == "commit"
    assert hub.calls[0] == ("create", "mine", None, "other")
    kind, name, files, *rest = hub.calls[1]
    assert (kind, name, rest) == ("upload", "someone/mine", ["First", "side"]) and "model.safetensors" in files
    hub.fault = huggingface_hub.errors.HFValidationError("no such name")
    with pytest.raises(HubError, match="no such name"):
        trainer.push_to_hub()


def test_other_strategies_say_what_there_is():
    with pytest.raises(ConfigError, match="hub_strategy is 'every_save'; a run is pushed when it ends: give end"):
        SFTConfig(hub_strategy="every_save")
