"""Pushing what a run has made to the Hugging Face Hub."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxpost.errors import ConfigError, HubError, one_line
from jaxpost.options import Group, option

Got = TypeVar("Got")
NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
NOT_PUSHED = ("checkpoints/**", "completions/**", "runs/**", ".*", "*.tmp*")  # of output_dir: no part of the model


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Whether and where the model is pushed; named as in transformers' TrainingArguments."""

    help_group = Group.HUB

    push_to_hub: bool = option(False, "Push the model to the Hugging Face Hub when the run ends.", may_change=True)
    hub_model_id: str | None = option(
        None, "Its name there, owner/name; by default that of output_dir.", may_change=True
    )
    hub_private_repo: bool | None = option(None, "Whether a repository that is new is private.", may_change=True)
    hub_token: str | None = option(
        None,
        "Token to write with; by default that of HF_TOKEN, which others on this machine cannot see, or of `hf auth "
        "login`.",
        may_change=True,
        secret=True,
    )
    hub_strategy: str = option("end", "When to push: end.", may_change=True)

    def __post_init__(self) -> None:
        if self.hub_strategy != "end":
            raise ConfigError(
                f"hub_strategy is {self.hub_strategy!r}; a run is pushed when it ends: give end, or leave it out"
            )
        if self.hub_model_id is not None and not NAME.fullmatch(self.hub_model_id):
            raise ConfigError(f"hub_model_id is {self.hub_model_id!r}; give owner/name, or name alone")


class Repository:
    """A model's repository on the Hub, made where it is missing.

    Args:
        config: its name, and the token to write with.
        folder: that is pushed; its name is the repository's by default.
        token: instead of the config's.

    Attributes:
        name: owner/name.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """

    def __init__(self, config: HubConfig, folder: Path, token: str | None = None):
        from huggingface_hub import HfApi

        self._folder, self._token = folder, token or config.hub_token
        self.name = config.hub_model_id or folder.resolve().name
        self._api = HfApi(token=self._token)
        made = self._asked(
            lambda: self._api.create_repo(self.name, private=config.hub_private_repo, exist_ok=True, repo_type="model"),
            "cannot be made; log in with `hf auth login`, name it with --hub_model_id, or leave out --push_to_hub",
        )
        self.name = made.repo_id

    def push(self, message: str = "End of training", revision: str | None = None) -> Any:
        """Upload the model, its card, metrics and curves.

        Returns:
            huggingface_hub's CommitInfo.

        Raises:
            HubError: the Hub refuses, or cannot be reached.
        """
        return self._asked(
            lambda: self._api.upload_folder(
                repo_id=self.name,
                folder_path=os.fspath(self._folder),
                commit_message=message,
                revision=revision,
                ignore_patterns=list(NOT_PUSHED),
            ),
            f"cannot be pushed to; {self._folder} has the model",
        )

    def _asked(self, ask: Callable[[], Got], fault: str) -> Got:
        try:
            return ask()
        except Exception as error:  # of the Hub's client, its validation, or the network
            reason = one_line(error)
            if self._token:
                reason = reason.replace(self._token, "***")
            raise HubError(f"the repository {self.name} on the Hub {fault} ({reason})") from None
