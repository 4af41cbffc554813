"""Special tokens, cloned templates and the ids that end a completion, against ids counted by hand."""

import copy
import logging

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxpost.data.tokenizer import (
    TokenizerConfig,
    clone_chat_template,
    embedding_rows,
    eos_ids,
    num_ids,
    prepare_tokenizer,
    special_ids,
)
from jaxpost.errors import ConfigError
from tests.conftest import make_tokenizer

IDS = 259  # of the tests' tokenizer


@pytest.fixture(scope="module")
def shared():
    return make_tokenizer()


@pytest.fixture
def tokenizer(shared):
    return copy.deepcopy(shared)


def changed(tokenizer, **attributes):
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def source(tokenizer, folder, *tokens, **attributes):
    """The folder of another model's tokenizer: a copy with more tokens and other attributes."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    changed(other, **attributes).save_pretrained(folder)
    return str(folder)


def prepare(tokenizer, **options):
    return prepare_tokenizer(tokenizer, TokenizerConfig(**options))


def test_the_config_names_tokens_and_a_template_file(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0]['content'] }}☕", encoding="utf-8")
    found = prepare(tokenizer, eos_token="<pad>", pad_token="<|im_start|>", chat_template_path=str(path))
    assert found is tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, num_ids(tokenizer)) == (2, 0, IDS)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab☕"


def test_nothing_asked_for_changes_nothing(tokenizer):
    before = (tokenizer.chat_template, tokenizer.get_vocab())
    prepare(tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<pad>")
    assert (tokenizer.chat_template, tokenizer.get_vocab()) == before


def test_eos_pads_where_no_token_does(tokenizer):
    assert prepare(changed(tokenizer, pad_token=None)).pad_token == "<|im_end|>"
    assert prepare(changed(tokenizer, pad_token=None), eos_token="<pad>").pad_token == "<pad>"


def test_with_neither_pad_nor_eos_the_flags_are_named(tokenizer):
    with pytest.raises(ConfigError, match=r"neither a pad nor an EOS token; name one with --pad_token or --eos_token"):
        prepare(changed(tokenizer, pad_token=None, eos_token=None))
    assert prepare(tokenizer, pad_token="<pad>").eos_token is None  # rows of messages may do without


@pytest.mark.parametrize("flag", ["eos_token", "pad_token"])
def test_a_token_that_is_not_there_is_answered_with_the_nearest(flag, tokenizer):
    message = (
        rf"{flag} '<\|im_edn\|>' is not in the tokenizer's vocabulary; the nearest special tokens are <\|im_end\|>"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(tokenizer, **{flag: "<|im_edn|>"})
    with pytest.raises(ConfigError, match=f"{flag} '' is not in"):
        prepare(tokenizer, **{flag: ""})


def test_a_token_set_in_python_is_checked_too(tokenizer):
    with pytest.raises(ConfigError, match="eos_token '</s>' is not in the tokenizer's vocabulary"):
        prepare(changed(tokenizer, eos_token="</s>"))


def test_a_clone_takes_template_tokens_and_eos_and_fills_up_to_64(tokenizer, tmp_path):
    template = "{% for m in messages %}<turn>{{ m['content'] }}<end>{% endfor %}"
    other = source(tokenizer, tmp_path / "other", "<turn>", "<end>", chat_template=template, eos_token="<end>")
    tokenizer.add_tokens(["<extra_id_1>"])  # one that is there already is not added again
    prepare(tokenizer, chat_template_path=other)
    assert tokenizer.chat_template == template
    assert tokenizer.convert_tokens_to_ids(["<extra_id_1>", "<turn>", "<end>"]) == [IDS, IDS + 1, IDS + 2]
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_2>", "<extra_id_58>"]) == [262, 263, 319]
    assert (num_ids(tokenizer), len(tokenizer)) == (320, 320)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<pad>")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert (ids[0], ids[-1], len(ids)) == (IDS + 1, IDS + 2, 4)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"  # special as in the source


def test_a_clone_leaves_tokens_that_are_there_as_they_are(tokenizer, tmp_path):
    other = source(tokenizer, tmp_path / "other", "<turn>", "<extra_id_2>")
    tokenizer.add_tokens(["<turn>"])
    prepare(tokenizer, chat_template_path=other)
    assert [tokenizer.added_tokens_decoder[id].special for id in (IDS, IDS + 1, IDS + 2)] == [False, True, False]
    assert tokenizer.convert_tokens_to_ids(["<turn>", "<extra_id_2>", "<extra_id_3>"]) == [IDS, IDS + 1, IDS + 4]
    assert num_ids(tokenizer) == 320


def test_a_clone_returns_the_new_ids(tokenizer, tmp_path):
    other = source(tokenizer, tmp_path / "other", "<turn>")
    assert clone_chat_template(tokenizer, other, resize_to_multiple_of=4) == [IDS]
    assert clone_chat_template(tokenizer, other, resize_to_multiple_of=7) == list(range(IDS + 1, 266))
    assert clone_chat_template(tokenizer, other, resize_to_multiple_of=1) == []


def test_an_eos_that_is_asked_for_wins_over_the_cloned_one(tokenizer, tmp_path):
    other = source(tokenizer, tmp_path / "other", "<turn>", "<end>", eos_token="<turn>")
    assert prepare(tokenizer, chat_template_path=other, eos_token="<end>").eos_token == "<end>"


def test_a_source_without_eos_leaves_the_own(tokenizer, tmp_path):
    other = source(tokenizer, tmp_path / "other", eos_token=None)
    assert prepare(tokenizer, chat_template_path=other).eos_token == "<|im_end|>"


def test_of_several_templates_the_default_one_is_cloned(tokenizer, tmp_path):
    named = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    several = source(tokenizer, tmp_path / "several", chat_template=named)
    assert prepare(tokenizer, chat_template_path=several).chat_template == "{{ messages }}"
    lacking = source(tokenizer, tmp_path / "lacking", chat_template={"rag": "{{ documents }}"})
    with pytest.raises(ConfigError, match="that tokenizer has no chat template"):
        prepare(tokenizer, chat_template_path=lacking)


def bad_sources(folder):
    (folder / "empty").mkdir()
    (folder / "latin.jinja").write_bytes(b"\xff{{")
    (folder / "folder.jinja").mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    return {
        "nowhere.jinja": "cannot be read: .*No such file",
        "latin.jinja": "cannot be read: 'utf-8' codec",
        "folder.jinja": "cannot be read: .*Is a directory",
        "model.gguf": r"is a file, but no template: they end in \.jinja",
        "empty": "is no template file, and no tokenizer can be read there",
        "nowhere": "is no template file, and no tokenizer can be read there",
        "nul\0.jinja": "cannot be read: embedded null byte",
        "n" * 300: "no tokenizer can be read there",
    }


@pytest.mark.parametrize("number", range(8))
def test_a_source_that_is_neither_file_nor_tokenizer_is_one_line(number, tokenizer, tmp_path):
    name, message = list(bad_sources(tmp_path).items())[number]
    with pytest.raises(ConfigError, match=f"^chat_template_path .* {message}") as caught:
        prepare(tokenizer, chat_template_path=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_rows_grow_for_added_tokens_alone(tokenizer):
    assert embedding_rows(tokenizer, IDS) == IDS
    assert embedding_rows(tokenizer, 300) == 300
    assert embedding_rows(tokenizer, 258) == 258  # a letter has no row: another model's tokenizer
    tokenizer.add_tokens(["<new>"])
    assert embedding_rows(tokenizer, 260) == 260
    assert embedding_rows(tokenizer, IDS) == 320
    assert embedding_rows(tokenizer, IDS, multiple=1) == 260
    assert embedding_rows(tokenizer, 258) == 258


def test_gaps_in_the_ids_count_and_stand_in_the_way_of_new_tokens(tokenizer, tmp_path):
    """The tokenizers library numbers new tokens from the number of old ones on, over the gap and into `b`."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 5, "<unk>": 1}, unk_token="<unk>"))
    gapped = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    assert (len(gapped), num_ids(gapped), embedding_rows(gapped, 6), embedding_rows(gapped, 5)) == (3, 6, 6, 5)
    other = source(tokenizer, tmp_path / "other", "<1>", "<2>", "<3>")
    with pytest.raises(
        ConfigError, match=r"3 tokens have ids up to 5, so a new one would share id 5; give a \.jinja file"
    ):
        prepare(gapped, chat_template_path=other)


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({}, {}, [1]),
        ({"eos_token_id": 5}, {"eos_token_id": 6}, [1, 5]),
        ({"eos_token_id": [7, 1, 5, 7]}, {}, [1, 7, 5]),
        ({"eos_token_id": None, "temperature": 1.0}, {"eos_token_id": [6, 8]}, [1, 6, 8]),
        ({"eos_token_id": []}, {"eos_token_id": 6}, [1]),
    ],
)
def test_ids_that_end_a_completion(generation_config, config, expected, tokenizer):
    assert eos_ids(tokenizer, generation_config, config, 320) == expected
    without = [id for id in expected if id != 1]
    no_end = changed(tokenizer, eos_token=None)
    assert [id for id in eos_ids(no_end, generation_config, config, 320) if id != 1] == without


@pytest.mark.parametrize("value", ["1", True, 1.0, {}, [1, "2"], [False], [[1]], [None]])
def test_an_end_that_is_no_id_names_file_and_field(value, tokenizer):
    with pytest.raises(
        ConfigError, match=r"^generation_config\.json: eos_token_id is .*; it must be a token id or a l"
    ):
        eos_ids(tokenizer, {"eos_token_id": value}, {"eos_token_id": 1}, 320)
    with pytest.raises(ConfigError, match=r"^config\.json: eos_token_id is "):
        eos_ids(tokenizer, {}, {"eos_token_id": value}, 320)


def test_an_end_outside_of_the_vocabulary_is_told_and_left_out(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        assert eos_ids(tokenizer, {"eos_token_id": [319]}, {}, 320) == [1, 319]
        assert not caplog.messages
        assert eos_ids(tokenizer, {"eos_token_id": [320, 5, -1]}, {}, 320) == [1, 5]
    assert caplog.messages == [
        "generation_config.json: eos_token_id is [320, 5, -1]; an id outside of the 320 tokens does not count"
    ]


def test_special_ids_are_the_tokenizers_and_keep_the_base_models_ends(tokenizer):
    assert special_ids(tokenizer, {"eos_token_id": [5, 6]}, {}, 320) == {
        "bos_token_id": 0,
        "eos_token_id": [1, 5, 6],
        "pad_token_id": 2,
    }
    assert special_ids(tokenizer, {}, {"eos_token_id": 1}, 320)["eos_token_id"] == 1
    bare = changed(tokenizer, eos_token=None, bos_token=None)
    assert special_ids(bare, {}, {}, 320) == {"pad_token_id": 2}
