"""The tokenizer of a run: its special tokens, its chat template, and the embedding rows that its ids need."""

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpost.errors import ConfigError, one_line
from jaxpost.options import Group, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

VOCAB_MULTIPLE = 64  # a vocabulary that grows does so to a multiple of this, as in TRL
TEMPLATE_FILES = (".jinja", ".jinja2", ".j2")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Special tokens and chat template; TRL's names and defaults."""

    help_group = Group.DATA

    eos_token: str | None = option(None, "End-of-sequence token to use in place of the tokenizer's.")
    pad_token: str | None = option(None, "Padding token to use in place of the tokenizer's; EOS where it has none.")
    chat_template_path: str | None = option(
        None, "A .jinja file, or a model whose chat template, EOS and added tokens to use."
    )


def prepare_tokenizer(tokenizer: "Tokenizer", config: TokenizerConfig) -> "Tokenizer":
    """Set the tokenizer's chat template, EOS and pad token, in place, as the config says; without a pad token EOS pads.

    EOS may pad because no mask is ever made from ids. An `eos_token` that is asked for wins over a cloned one, which
    may be one of the tokens that cloning added.

    Raises:
        ConfigError: a token is not in the vocabulary, or there is neither a pad nor an EOS token, or no such template.
    """
    path = config.chat_template_path
    if path is not None and path.endswith(TEMPLATE_FILES):
        tokenizer.chat_template = _read_template(path)
    elif path is not None:
        clone_chat_template(tokenizer, path)
    own: Mapping[str, Any] = tokenizer.special_tokens_map
    eos_token = own.get("eos_token") if config.eos_token is None else config.eos_token
    pad_token = own.get("pad_token", eos_token) if config.pad_token is None else config.pad_token
    if pad_token is None:
        raise ConfigError("the tokenizer has neither a pad nor an EOS token; name one with --pad_token or --eos_token")
    for flag, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None and token not in tokenizer.get_vocab():
            raise ConfigError(f"{flag} {token!r} is not in the tokenizer's vocabulary; {_nearest(token, tokenizer)}")
    tokenizer.eos_token, tokenizer.pad_token = eos_token, pad_token
    return tokenizer


def clone_chat_template(tokenizer: "Tokenizer", source: str, resize_to_multiple_of: int = VOCAB_MULTIPLE) -> list[int]:
    """Give a tokenizer the chat template, the EOS and the added tokens of another, in place, as TRL's function does.

    Tokens `<extra_id_n>` fill the vocabulary to a multiple, so that it ends where the embedding ends. Unlike in TRL, a
    source without an EOS leaves the tokenizer's own.

    Args:
        tokenizer: the one to change.
        source: hub id or local folder of the other.
        resize_to_multiple_of: of the size of the vocabulary.

    Returns:
        The ids that are new.

    Raises:
        ConfigError: there is no tokenizer at `source`, it has no chat template, or a new token would share an id.
    """
    other = _load(source)
    template = default_template(other)
    if template is None:
        raise ConfigError(f"chat_template_path {source!r}: that tokenizer has no chat template; name one that has")
    before = tokenizer.get_vocab()
    theirs = [token for _, token in sorted(other.added_tokens_decoder.items())]
    tokenizer.add_tokens([token for token in theirs if token.content not in before])
    taken = tokenizer.get_vocab()
    fillers = (name for n in count() if (name := f"<extra_id_{n}>") not in taken)
    tokenizer.add_tokens(list(islice(fillers, -num_ids(tokenizer) % resize_to_multiple_of)))
    tokenizer.chat_template, tokenizer.eos_token = template, other.eos_token or tokenizer.eos_token
    new = sorted(id for token, id in tokenizer.get_vocab().items() if token not in before)
    if shared := set(new) & set(before.values()):  # new ids begin at the number of tokens, not after the largest
        found = f"{len(before)} tokens have ids up to {max(before.values())}, so a new one would share id {min(shared)}"
        raise ConfigError(f"chat_template_path {source!r} cannot be cloned: {found}; give a .jinja file")
    return new


def default_template(tokenizer: "Tokenizer") -> str | None:
    """The tokenizer's chat template, the default one where it has several."""
    named = tokenizer.chat_template
    return (named.get("default") if isinstance(named, dict) else named) or None


def num_ids(tokenizer: "Tokenizer") -> int:
    """One more than the largest id; with gaps in the vocabulary that is more than its length."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def embedding_rows(tokenizer: "Tokenizer", vocab_size: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """Rows that a model of `vocab_size` needs: as many, or up to the next multiple where tokens were added beyond.

    A vocabulary that is larger even without its added tokens was made for another model, which no new rows mend: the
    size stays, and the first text that uses such an id is refused.
    """
    needed, added = num_ids(tokenizer), tokenizer.added_tokens_decoder
    foreign = any(id >= vocab_size and id not in added for id in tokenizer.get_vocab().values())
    return vocab_size if needed <= vocab_size or foreign else needed + -needed % multiple


def eos_ids(
    tokenizer: "Tokenizer", generation_config: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int
) -> list[int]:
    """Every id that ends a completion, the tokenizer's own first.

    As in transformers, `generation_config.json` says which, and `config.json` where it does not.

    Raises:
        ConfigError: an entry is not an id.
    """
    files = {"generation_config.json": generation_config, "config.json": config}
    listed = {file: given for file, fields in files.items() if (given := fields.get("eos_token_id")) is not None}
    file, given = next(iter(listed.items()), ("", []))
    ids = given if isinstance(given, list) else [given]
    if not all(type(id) is int for id in ids):  # a bool is an int, but no id
        raise ConfigError(f"{file}: eos_token_id is {given!r}; it must be a token id or a list of token ids")
    known = [id for id in ids if 0 <= id < vocab_size]
    if known != ids:
        logger.warning(f"{file}: eos_token_id is {given}; an id outside of the {vocab_size} tokens does not count")
    own: Any = tokenizer.eos_token_id
    return list(dict.fromkeys(known if own is None else [own, *known]))


def special_ids(
    tokenizer: "Tokenizer", generation_config: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
    """What a fine-tuned model's `config.json` and `generation_config.json` say of its special tokens: the tokenizer's.

    The base model's end tokens stay beside the tokenizer's. Nothing in training makes one of them invalid: the base
    model ended texts with them and may still, and where it does, a reader that no longer stops there reads on through
    noise to the maximum length. transformers' own Trainer keeps them too.

    Raises:
        ConfigError: a listed end token is not an id.
    """
    ends = eos_ids(tokenizer, generation_config, config, vocab_size)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {name: id for name, id in ids.items() if id is not None}


def _nearest(token: str, tokenizer: "Tokenizer") -> str:
    """The special tokens that are most like this one, as a remedy."""
    special = [added.content for added in tokenizer.added_tokens_decoder.values()]
    nearest = difflib.get_close_matches(token, special, n=3, cutoff=0)
    return f"the nearest special tokens are {', '.join(nearest)}" if nearest else "it has no special tokens"


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template_path {path!r} cannot be read: {one_line(error)}") from error


def _load(source: str) -> "Tokenizer":
    """A tokenizer by hub id or folder, never running code that comes with it."""
    from transformers import AutoTokenizer

    if os.path.isfile(source):
        kinds = ", ".join(TEMPLATE_FILES)
        raise ConfigError(f"chat_template_path {source!r} is a file, but no template: they end in {kinds}")
    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(source), trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises whatever its parsers raise; a panic in Rust is no Exception
        found = f"chat_template_path {source!r} is no template file, and no tokenizer can be read there"
        raise ConfigError(f"{found}: {one_line(error)}") from error
