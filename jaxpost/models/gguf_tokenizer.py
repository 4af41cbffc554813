"""The tokenizer of a GGUF file as a transformers tokenizer, built from the file's metadata without torch.

Source: llama.cpp's llama-vocab.cpp for what the metadata means, and the `tokenizer.json` that the named models publish
for how `tokenizers` spells it.
"""

import dataclasses
from typing import TYPE_CHECKING

from jaxpost.models.gguf_file import CONVERT, HF_FOLDER, Metadata

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_MODEL, _PRE, _MERGES = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.merges"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# No vocabulary has longer pieces, and deriving merges takes the square of the length.
_MAX_PIECE = 256
_SPACE = "\u2581"  # how SentencePiece writes a space

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class _PreTokenizer:
    """How one value of `tokenizer.ggml.pre` cuts text before the merges."""

    split: str = ""  # regular expression; empty is GPT-2's, which ByteLevel brings
    digits: bool = False  # every digit is a piece of its own
    nfc: bool = False  # text is put in Unicode normal form C first
    ignore_merges: bool = False  # a piece that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


_GPT2 = _PreTokenizer()
_LLAMA3 = _PreTokenizer(split=_WORDS + r"\p{N}{1,3}" + _REST, ignore_merges=True, add_bos=True)
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _PreTokenizer(split=_WORDS + r"\p{N}" + _REST, nfc=True),
    "smollm": _PreTokenizer(digits=True),
}


def build_tokenizer(metadata: Metadata, vocab_size: int, max_length: int) -> "PreTrainedTokenizerFast":
    """Return the tokenizer that the metadata describes, with `model_max_length` = `max_length` tokens.

    Raises:
        ConfigError: names the key that is missing, damaged or of a kind that is not supported.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens = metadata.array("tokenizer.ggml.tokens", str, vocab_size)
    kinds = metadata.array("tokenizer.ggml.token_type", int, vocab_size, default=[_NORMAL] * vocab_size)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise metadata.error(f"tokenizer.ggml.tokens lists {twice[:40]!r} twice; {CONVERT}")
    model = metadata.get(_MODEL, str)
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, vocab)
    elif model == "llama":
        backend, add_bos = _sentencepiece(metadata, vocab), True
    else:
        raise metadata.error(f"{_MODEL} {model[:40]!r} is not supported (supported: gpt2, llama); {HF_FOLDER}")
    marked = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if token]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in marked if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in marked if k == _USER_DEFINED])

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: metadata.token_id(name, vocab_size) for role, name in names.items()}
    special = {f"{role}_token": tokens[index] for role, index in ids.items() if index is not None}
    bos = _framing(metadata, "tokenizer.ggml.add_bos_token", add_bos, special.get("bos_token"))
    eos = _framing(metadata, "tokenizer.ggml.add_eos_token", False, special.get("eos_token"))
    if bos or eos:
        _frame(backend, bos, eos, vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template", str, None),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: Metadata, vocab: dict[str, int]) -> tuple["Tokenizer", bool]:
    """Return a byte-level BPE tokenizer, and whether its kind starts a text with BOS unless told otherwise."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    name = metadata.get(_PRE, str)
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise metadata.error(f"{_PRE} {name[:40]!r} is not supported (supported: {known}); {HF_FOLDER}")
    pre = _PRE_TOKENIZERS[name]
    merges = _pairs(metadata, vocab, metadata.array(_MERGES, str))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.split))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, pre.add_bos


def _sentencepiece(metadata: Metadata, vocab: dict[str, int]) -> "Tokenizer":
    """Return a SentencePiece BPE tokenizer; a file that lists no merges implies them by its scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    listed = metadata.array(_MERGES, str, default=None)
    if listed is not None:
        merges = _pairs(metadata, vocab, listed)
    else:
        scores = metadata.array("tokenizer.ggml.scores", float, len(vocab))
        if max(map(len, vocab)) > _MAX_PIECE:
            raise metadata.error(f"tokenizer.ggml.tokens has a token of over {_MAX_PIECE} characters; {HF_FOLDER}")
        merges = generate_merges(vocab, dict(zip(vocab, scores, strict=True)))
    unknown = metadata.token_id("unknown", len(vocab))
    name = None if unknown is None else list(vocab)[unknown]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=name, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    # As in Llama 2's tokenizer.json and in llama.cpp: a space before every stretch of text between special tokens.
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _pairs(metadata: Metadata, vocab: dict[str, int], merges: list[str]) -> list[tuple[str, str]]:
    """Return the merges as pairs, whose parts and results must all be tokens."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise metadata.error(f"{_MERGES} has {merge[:40]!r}, which does not merge tokens; {CONVERT}")
        pairs.append((left, right))
    return pairs


def _framing(metadata: Metadata, key: str, default: bool, token: str | None) -> list[str]:
    """Return the BOS or EOS token in a list if the flag `key` asks for it around every text, else nothing."""
    if not metadata.get(key, bool, default and token is not None):
        return []
    if token is None:
        raise metadata.error(f"{key} is true but the file does not say which token that is; {CONVERT}")
    if ":" in token or token.startswith("$"):  # has a meaning in the template of `_frame`
        raise metadata.error(f"{token[:40]!r} cannot stand around every text; {HF_FOLDER}")
    return [token]


def _frame(backend: "Tokenizer", bos: list[str], eos: list[str], vocab: dict[str, int]) -> None:
    """Make the tokenizer put the tokens `bos` before and the tokens `eos` behind every text."""
    from tokenizers import processors

    single = [*bos, "$A", *eos]
    pair = [*single, *(f"{piece}:1" for piece in (*bos, "$B", *eos))]
    special = [(token, vocab[token]) for token in {*bos, *eos}]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    first = backend.post_processor
    backend.post_processor = template if first is None else processors.Sequence([first, template])
