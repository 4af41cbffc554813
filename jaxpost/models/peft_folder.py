"""A folder with an adapter in PEFT's format, opened and checked as far as that goes without its base."""

import os
from pathlib import Path
from typing import Any

from jaxpost.errors import ConfigError
from jaxpost.models.checkpoint import download, folder_file, load_tokenizer, read_json
from jaxpost.models.lora_config import read_lora_config
from jaxpost.models.lora_init import SUBTRACTED
from jaxpost.models.publish import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS
from jaxpost.models.safetensors_file import map_safetensors

PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
# Initialisations that leave the base alone; those of SUBTRACTED are computed again from the base.
HARMLESS = (True, False, "gaussian", "eva", "orthogonal", *SUBTRACTED)


class AdapterFolder:
    """A folder with an adapter of PEFT's, checked as far as that goes without its base.

    Attributes:
        source: what to call it in errors.
        folder: where it is.
        config: what adapter_config.json says.
        tensors: views into its file, by name.

    Raises:
        ConfigError: a file is missing, damaged or of a kind that is never opened, or asks for what is not supported.
    """

    def __init__(self, folder: Path, source: str):
        self.folder, self.source = folder, source
        config, weights = folder_file(folder, ADAPTER_CONFIG), folder_file(folder, ADAPTER_WEIGHTS)
        if config is None:
            raise ConfigError(
                f"{source}: no {ADAPTER_CONFIG}; an adapter's folder holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
            )
        self.config = read_lora_config(read_json(config), str(config))
        if self.config.init_lora_weights not in HARMLESS:
            raise ConfigError(
                f"{config}: init_lora_weights {self.config.init_lora_weights!r:.80} changes the base in a way that "
                "cannot be repeated; save the adapter again with path_initial_model_for_weight_conversion"
            )
        if weights is None:
            pickled = os.path.lexists(folder / PICKLE)
            raise ConfigError(
                f"{folder / PICKLE}: pickled weights can run code and are never opened; save the adapter with "
                "safe_serialization"
                if pickled
                else f"{source}: no {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}"
            )
        self.tensors = {name.removeprefix(PREFIX): tensor for name, tensor in map_safetensors(weights).items()}

    @property
    def base(self) -> str:
        """Where the model is that the adapter is for: a hub id or a path.

        Raises:
            ConfigError: nothing is said, or the path leads nowhere.
        """
        base = self.config.base_model_name_or_path
        remedy = f"set base_model_name_or_path in {self.folder / ADAPTER_CONFIG} to a hub id or a local folder"
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{self.source}: it does not say which model it is for; {remedy}")
        is_path = base.startswith((".", "/", "~")) or base.count("/") > 1
        if is_path and not os.path.exists(os.path.expanduser(base)):
            raise ConfigError(f"{self.source}: the model that it is for, {base[:200]!r}, does not exist here; {remedy}")
        return base

    def tokenizer(self) -> Any:
        """Its own tokenizer; None where only the base has one."""
        return load_tokenizer(self.folder) if (self.folder / "tokenizer_config.json").exists() else None


def open_adapter(name_or_path: str | os.PathLike[str], revision: str | None = None) -> AdapterFolder | None:
    """The adapter in a local folder or a hub repository; None where a model is.

    Raises:
        ConfigError: see `AdapterFolder`; or the hub has nothing of this name.
    """
    path = Path(os.path.expanduser(name_or_path))
    if path.suffix == ".gguf" or os.path.isfile(path):
        return None
    folder = path if os.path.isdir(path) else download(str(name_or_path), revision)
    holds_model = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    if holds_model or not os.path.lexists(folder / ADAPTER_CONFIG):
        return None
    return AdapterFolder(folder, str(name_or_path))
