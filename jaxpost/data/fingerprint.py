"""What tokenised rows depend on, as digests of 32 hexadecimal digits."""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LIBRARIES = ("transformers", "tokenizers", "jinja2")


def digest(*values: Any) -> str:
    """Of values that `repr` writes in full."""
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Of the contents of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def tokenizer_digest(tokenizer: "Tokenizer") -> str | None:
    """Of a tokenizer with its special tokens and chat template; None where it is not known in full (slow ones)."""
    if not tokenizer.is_fast:
        return None
    backend: Any = tokenizer
    parts = (backend.backend_tokenizer.to_str(), sorted(tokenizer.special_tokens_map.items()), tokenizer.chat_template)
    return digest(type(tokenizer).__name__, *parts)


@functools.cache
def code_digest() -> str:
    """Of the code that makes examples of rows: this package, and the libraries that it calls."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return digest(*(path.read_bytes() for path in sources), *((name, version(name)) for name in LIBRARIES))
