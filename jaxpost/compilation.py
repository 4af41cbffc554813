"""How programs are compiled, and the folder where they are kept for the next process that needs them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxpost.errors import ConfigError
from jaxpost.options import Group, option
from jaxpost.platform import platform


@dataclass(frozen=True, kw_only=True)
class CompilationConfig:
    """Whether they are kept, and where."""

    help_group = Group.DEVICES

    compilation_cache_dir: str = option(
        "~/.cache/jaxpost/xla", "Folder for compiled programs; empty for none.", may_change=True
    )

    def __post_init__(self) -> None:
        if self.compilation_cache_dir and Path(self.compilation_cache_dir).expanduser().is_file():
            raise ConfigError(f"compilation_cache_dir {self.compilation_cache_dir} is a file; give a folder")


def keep_programs(config: CompilationConfig) -> None:
    """From here on what this process compiles is looked for there first, and left there where it took a second."""
    if folder := config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


def as_written() -> dict[str, Any]:
    """Compiler options of a program that must say of a token what another one says of it: the sampler, the trainer.

    On CPU they round to bfloat16 wherever the program does. By default XLA leaves out roundings between operations that
    it fuses, others in each program. Elsewhere this has not been measured, and is left as it is.
    """
    return {"xla_allow_excess_precision": False} if platform() == "cpu" else {}
