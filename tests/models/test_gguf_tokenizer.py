"""Tokenizers rebuilt from GGUF metadata."""

import json
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxpost.errors import ConfigError
from jaxpost.models.gguf import GGUFCheckpoint
from tests.models.gguf_files import (
    BYTE_LEVEL,
    CONTROL,
    TEMPLATE,
    USER_DEFINED,
    gemma_keys,
    sentencepiece_keys,
    write_model,
)

TEXTS = [
    "Hello, world! It's 1984 and 3.14159 < 22/7.",
    "  two leading spaces, a tab\t, CRLF\r\n and \n\n\n newlines  ",
    "emoji 🤗👩‍👩‍👧 flags 🇯🇵, naïve café, 漢字かな交じり, العربية, ½²Ⅷ",
    "def f(x):\n    return x ** 2  # code",
    "<|im_start|>user\nhi 42<|im_end|>\n",
    "",
]


def encode(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("pre", "digits", "stop", "word"),
    [
        ("smollm", ["1", "7"], [".", "t"], ["x", "y", "z"]),
        ("gpt-2", ["17"], [".", "t"], ["x", "y", "z"]),
        ("default", ["17"], [".", "t"], ["x", "y", "z"]),
        ("qwen2", ["1", "7"], [".t"], ["x", "y", "z"]),
        ("llama-bpe", ["17"], [".t"], ["xyz"]),
    ],
)
def test_each_pre_tokenizer_cuts_its_own_way(tmp_path, pre, digits, stop, word):
    changes = {"tokenizer.ggml.pre": pre}
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", changes)).tokenizer()
    assert encode(tokenizer, "17") == digits
    assert encode(tokenizer, ".t") == stop
    assert encode(tokenizer, "xyz") == word
    assert encode(tokenizer, "the the") == ["the", "Ġthe"]
    assert (tokenizer("t")["input_ids"][0] == 1) == (pre == "llama-bpe")  # Llama 3 starts with BOS, the others do not


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_text_survives_the_round_trip(tmp_path, pre):
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre})).tokenizer()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_single_ids(tmp_path):
    kinds = [3, 3, 3] + [1] * (len(BYTE_LEVEL) - 4) + [4]  # "xyz" is user-defined: whole, but not special
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", {"tokenizer.ggml.token_type": kinds})).tokenizer()
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"] == [1, BYTE_LEVEL.index("a"), 2]
    assert encode(tokenizer, "xxyz") == ["x", "xyz"]
    assert tokenizer.decode([1, BYTE_LEVEL.index("xyz"), 2], skip_special_tokens=True) == "xyz"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>" and len(tokenizer) == len(BYTE_LEVEL)
    assert tokenizer.model_max_length == 128
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert rendered == "<|im_start|>user\nthe<|im_end|>\n"


def test_control_tokens_are_special_whether_or_not_they_have_a_role(tmp_path):
    roles = [f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "unknown", "padding")]
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", dict.fromkeys(roles))).tokenizer()
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"] == [1, BYTE_LEVEL.index("a"), 2]
    assert tokenizer.decode([0, BYTE_LEVEL.index("a"), 1], skip_special_tokens=True) == "a"
    assert tokenizer.bos_token is None and tokenizer.pad_token is None


def test_qwen_composes_its_characters(tmp_path):
    for pre, decoded in (("qwen2", "\u00e9"), ("smollm", "e\u0301")):
        tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre})).tokenizer()
        assert tokenizer.decode(tokenizer("e\u0301")["input_ids"]) == decoded


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos_frame_the_text_if_the_file_says_so(tmp_path, bos, eos):
    changes = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", changes)).tokenizer()
    assert tokenizer("the")["input_ids"] == [1] * bos + [BYTE_LEVEL.index("the")] + [2] * eos
    pair = tokenizer("the", "the")
    assert pair["input_ids"] == 2 * ([1] * bos + [BYTE_LEVEL.index("the")] + [2] * eos)


def test_sentencepiece_follows_the_scores_and_falls_back_to_bytes(tmp_path):
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", tokenizer=sentencepiece_keys())).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("the hex")["input_ids"]) == ["<s>", "▁the", "▁", "he", "x"]
    assert encode(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("the hex", "é 🤗 x\n17", " the", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    changes = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    bare = GGUFCheckpoint(write_model(tmp_path / "b.gguf", changes, tokenizer=sentencepiece_keys())).tokenizer()
    assert encode(bare, "the") == ["t", "he"]
    assert bare.decode(bare(" the")["input_ids"]) == " the"


GEMMA_TEXTS = [
    *TEXTS,
    "<bos><start_of_turn>user\nthe there  x<end_of_turn>\n<start_of_turn>model\n",
    "<table> the\n\n\n\n   three\n    thexyz\tthe",
    " the the ",
    "<eos>t<unk><pad>",
]


def published_gemma(keys):
    """Gemma's tokenizer as its `tokenizer.json` spells it: merges instead of scores, a space as SentencePiece's."""
    spelled = ["▁" * len(token) if not token.strip(" ") else token for token in keys["tokenizer.ggml.tokens"]]
    spaces = [("▁" * left, "▁" * right) for left, right in ((1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (1, 3))]
    merges = [*spaces, ("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("t", "h")]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(spelled)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", 2)])
    added = zip(spelled, keys["tokenizer.ggml.token_type"], strict=True)
    for token, kind in added:
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    return tokenizer


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "gemma3"])
def test_gemma_has_the_ids_of_the_published_tokenizer(tmp_path, arch):
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", arch=arch)).tokenizer()
    published = published_gemma(gemma_keys())
    assert len(tokenizer) == published.get_vocab_size() == len(gemma_keys()["tokenizer.ggml.tokens"])
    for text in GEMMA_TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == published.encode(text).ids, text
        for skip in (True, False):
            decoded = tokenizer.decode(ids, skip_special_tokens=skip)
            assert decoded == published.decode(ids, skip_special_tokens=skip), text
        assert decoded == "<bos>" + text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer.unk_token == "<unk>"


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_gemmas_turns_are_single_ids_and_special_if_the_file_says_so(tmp_path, kind):
    keys = gemma_keys()
    turns = [keys["tokenizer.ggml.tokens"].index(token) for token in ("<start_of_turn>", "<end_of_turn>")]
    for turn in turns:
        keys["tokenizer.ggml.token_type"][turn] = kind
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", arch="gemma", tokenizer=keys)).tokenizer()
    ids = tokenizer("<start_of_turn>the<end_of_turn>")["input_ids"]
    assert [ids[1], ids[-1]] == turns and len(ids) == 5
    shown = "the" if kind == CONTROL else "<start_of_turn>the<end_of_turn>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == shown


RELOAD = """
import json, sys
sys.modules["torch"] = None  # as if it were not installed: importing it anywhere fails
from jaxpost.models.gguf import GGUFCheckpoint
source, folder, texts, messages = json.loads(sys.argv[1])
built = GGUFCheckpoint(source).tokenizer()
built.save_pretrained(folder)
from transformers import AutoTokenizer
loaded = AutoTokenizer.from_pretrained(folder)
for text in texts:
    assert built(text)["input_ids"] == loaded(text)["input_ids"], text
    assert built.decode(built(text)["input_ids"]) == loaded.decode(loaded(text)["input_ids"]), text
assert built.chat_template == loaded.chat_template
assert built.apply_chat_template(messages) == loaded.apply_chat_template(messages)
assert built.special_tokens_map == loaded.special_tokens_map
assert built.model_max_length == loaded.model_max_length and len(built) == len(loaded)
"""


@pytest.mark.parametrize(("arch", "with_config"), [("llama", False), ("llama", True), ("qwen2", True), ("gemma", True)])
def test_a_saved_tokenizer_is_the_same_and_needs_no_torch(tmp_path, arch, with_config):
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    changes = {**flags, "tokenizer.chat_template": TEMPLATE}
    source, folder = write_model(tmp_path / "m.gguf", changes, arch=arch), tmp_path / "saved"
    if with_config:  # a model folder: AutoTokenizer looks at the config's model_type, too
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(GGUFCheckpoint(source).config))
    arguments = json.dumps([str(source), str(folder), GEMMA_TEXTS, [{"role": "user", "content": "the 17"}]])
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", RELOAD, arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr


BAD_TOKENIZERS = {
    "unknown pre": ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported.*smollm"),
    "no pre": ({"tokenizer.ggml.pre": None}, "has no tokenizer.ggml.pre"),
    "unknown model": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
    "no merges": ({"tokenizer.ggml.merges": None}, "has no tokenizer.ggml.merges"),
    "alien merge": ({"tokenizer.ggml.merges": ["a b"]}, "has 'a b', which does not merge tokens"),
    "merge of one": ({"tokenizer.ggml.merges": ["the"]}, "has 'the', which does not merge tokens"),
    "twice": ({"tokenizer.ggml.tokens": [*BYTE_LEVEL[:-1], "the"]}, "lists 'the' twice"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, f"has 2 values for {len(BYTE_LEVEL)} tokens"),
    "template": ({"tokenizer.chat_template": 7}, "chat_template is '7', which is not of type str"),
    "BOS of none": ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "does not say which"),
    "long piece": (
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.tokens": [*BYTE_LEVEL[:-1], 300 * "x"],
            "tokenizer.ggml.scores": [0.0] * len(BYTE_LEVEL),
        },
        "a token of over 256 characters",
    ),
    "no scores": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, "has no tokenizer.ggml.scores"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS.keys())
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path, changes, message):
    path = write_model(tmp_path / "m.gguf", changes)
    checkpoint = GGUFCheckpoint(path)
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoint.tokenizer()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
