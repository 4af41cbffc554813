"""jaxpost: post-train language models in JAX. A checkpoint and a dataset go in, a post-trained checkpoint comes out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpost.methods import SFTConfig
    from jaxpost.models.export import save_pretrained
    from jaxpost.models.hf import from_pretrained
    from jaxpost.trainer import SFTTrainer

# Public name -> module; imported on first use, so that `import jaxpost` costs nothing.
_PUBLIC = {
    "from_pretrained": "jaxpost.models.hf",
    "save_pretrained": "jaxpost.models.export",
    "SFTConfig": "jaxpost.methods",
    "SFTTrainer": "jaxpost.trainer",
}

__all__ = ["SFTConfig", "SFTTrainer", "from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxpost' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
