"""Models by name: a checkpoint, or an adapter with the checkpoint of its base."""

import os
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax.sharding import Mesh

from jaxpost.errors import ConfigError
from jaxpost.models.check import SCORE
from jaxpost.models.checkpoint import Checkpoint, open_checkpoint
from jaxpost.models.config import Compute
from jaxpost.models.hf import load
from jaxpost.models.peft import hang
from jaxpost.models.peft_folder import AdapterFolder, open_adapter
from jaxpost.models.transformer import Decoder


class Source(NamedTuple):
    """A model that was found, its weights not read yet.

    Attributes:
        name: of the checkpoint, that of the base where there is an adapter; absolute if it is a path.
        revision: likewise.
        checkpoint: opened.
        adapter: opened, if there is one.
    """

    name: str
    revision: str | None
    checkpoint: Checkpoint
    adapter: AdapterFolder | None

    def has_trained_head(self, head: str) -> bool:
        """Whether weights of that head are stored; that of a language model always is."""
        adapted = () if self.adapter is None else self.adapter.tensors
        is_stored = SCORE in self.checkpoint.names() or any(name.startswith("score.") for name in adapted)
        return head == "lm" or is_stored

    def tokenizer(self) -> Any:
        """That of the adapter, where it has one."""
        own = None if self.adapter is None else self.adapter.tokenizer()
        return self.checkpoint.tokenizer() if own is None else own

    def load(self, **options: Any) -> Decoder:
        """The model, its adapter in use; options of `models.hf.load`."""
        model = load(self.checkpoint, self.name, **options)
        return model if self.adapter is None else hang(model, self.adapter)


@runtime_checkable
class Loaded(Protocol):
    """A model that transformers has loaded."""

    name_or_path: str


def named(model: Any, what: str) -> str | os.PathLike[str]:
    """A name or path, as it is.

    Raises:
        ConfigError: it is none; `what` it is called.
    """
    if isinstance(model, str | os.PathLike):
        return model
    kind = f"{type(model).__module__.split('.')[0]}'s {type(model).__name__}"
    name = f": {what}={model.name_or_path!r}" if isinstance(model, Loaded) and model.name_or_path else ""
    raise ConfigError(f"{what} is {kind}; give its name or folder{name}, or a model of jaxpost.from_pretrained")


def open_source(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Find a model by hub id, folder or .gguf file.

    Raises:
        ConfigError: there is none, or its files cannot be used.
    """
    adapter = open_adapter(name_or_path, revision)
    if adapter is not None:
        name_or_path, revision = adapter.base, adapter.config.revision
    path = os.path.abspath(os.path.expanduser(name_or_path))
    name = path if os.path.exists(path) else str(name_or_path)
    return Source(name, revision, open_checkpoint(name_or_path, revision), adapter)


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    head: str = "lm",
    dtype: str = "float32",
    compute: Compute | None = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
    quantization: str | None = None,
    allow_nonfinite: bool = False,
) -> Decoder:
    """Load a language model or a reward model from an HF folder, a hub id or a `.gguf` file; or an adapter of PEFT's.

    An adapter is found by its adapter_config.json, which says where its base is, and is in use: see `models.adapters`.

    Args:
        name_or_path: where the model is.
        head: `lm`, or `reward`: a score a token, new where the checkpoint is a language model.
        dtype: of the parameters: float32, bfloat16 or float16.
        compute: dtype, remat and kernel of the forward pass; by default the parameters' dtype, nothing recomputed.
        revision: branch, tag or commit of a hub repository.
        mesh: where to put the parameters; by default the first device.
        quantization: `nf4` (0.52 bytes a weight), `nf4_plain` (0.56) or `int8` stores the kernels of the blocks in few
            bits, as the frozen base of adapters. Each is quantised as it is read: the whole never takes more memory.
        allow_nonfinite: accept weights that are NaN or infinite.

    Returns:
        A model: `model(tokens) -> logits [B, T, V]`, or scores [B, T] with a reward head.

    Raises:
        ConfigError: missing or unsupported files, tensors or config fields, or weights that are not finite; the
            message lists them.
    """
    return open_source(name_or_path, revision).load(
        head=head,
        dtype=dtype,
        compute=compute,
        mesh=mesh,
        quantization=quantization,
        allow_nonfinite=allow_nonfinite,
    )
