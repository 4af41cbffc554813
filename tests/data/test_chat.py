"""Rows to tokens and loss masks, against ids and masks worked out by hand from the template."""

import copy
import logging

import datasets
import numpy as np
import pytest

from jaxpost.data.chat import SFTDataConfig, encode_prompt, encode_rows, prepare_tokenizer
from jaxpost.errors import ConfigError, DataError
from tests.conftest import make_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USER = {"role": "user", "content": "ab"}
ASSISTANT = {"role": "assistant", "content": "cde"}
OPENING = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
WHOLE = OPENING + "cde<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte: 259 ids."""
    return changed(make_tokenizer(), chat_template=CHATML)


def encode(rows, tokenizer, **options):
    return encode_rows(rows, tokenizer, SFTDataConfig(**options), vocab_size=len(tokenizer), name="rows.jsonl")


def trained_text(example, tokenizer):
    """The text of the tokens that are targets."""
    return tokenizer.decode(example.tokens[example.loss_mask])


def text_of(example, tokenizer):
    return tokenizer.decode(example.tokens)


def changed(tokenizer, **attributes):
    """A copy of the shared tokenizer with other attributes."""
    other = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def test_text_ends_with_one_eos_whatever_the_column(tokenizer):
    for column in ("text", "body"):
        rows = [{column: "abc"}, {column: "abc<|im_end|>"}]
        examples, counts = encode(rows, tokenizer, dataset_text_field=column)
        assert [text_of(example, tokenizer) for example in examples] == ["abc<|im_end|>"] * 2
        assert counts == (2, 0, 0)
        for example in examples:
            assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool
            assert example.loss_mask.tolist() == [False, True, True, True]


def test_messages_go_through_the_template_and_are_trained_throughout(tokenizer):
    [example], _ = encode([{"messages": [USER, ASSISTANT]}], tokenizer)
    assert text_of(example, tokenizer) == WHOLE
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_only_the_completion_is_trained(tokenizer):
    [example], _ = encode([{"prompt": [USER], "completion": [ASSISTANT]}], tokenizer)
    assert text_of(example, tokenizer) == WHOLE
    assert trained_text(example, tokenizer) == "cde<|im_end|>\n"
    [example], _ = encode([{"prompt": "ab", "completion": "cde"}], tokenizer)
    assert text_of(example, tokenizer) == "abcde<|im_end|>"
    assert trained_text(example, tokenizer) == "cde<|im_end|>"


def test_special_tokens_of_the_tokenizer_go_around_text_only(tokenizer):
    """A template writes its own; standard text gets those that the tokenizer puts in front."""
    from tokenizers.processors import TemplateProcessing

    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 2)])
    [example], _ = encode([{"prompt": "ab", "completion": "cde"}], starting)
    assert text_of(example, starting) == "<pad>abcde<|im_end|>"
    assert trained_text(example, starting) == "cde<|im_end|>"
    for options in ({}, {"assistant_only_loss": True}):
        [example], _ = encode([{"prompt": [USER], "completion": [ASSISTANT]}], starting, **options)
        assert text_of(example, starting) == WHOLE
    assert encode_prompt("ab", starting, vocab_size=259)[0] == 2
    assert starting.decode(encode_prompt([USER], starting, vocab_size=259)) == OPENING


def test_an_empty_completion_still_learns_to_stop(tokenizer):
    [example], _ = encode([{"prompt": "ab<|im_end|>", "completion": ""}], tokenizer)
    assert trained_text(example, tokenizer) == "<|im_end|>"
    assert text_of(example, tokenizer) == "ab<|im_end|><|im_end|>"


def test_completion_only_loss_false_trains_the_prompt_too(tokenizer):
    [example], _ = encode([{"prompt": "ab", "completion": "cde"}], tokenizer, completion_only_loss=False)
    assert trained_text(example, tokenizer) == "bcde<|im_end|>"


def test_only_assistant_turns_are_trained(tokenizer):
    second = {"role": "assistant", "content": "f☕"}
    rows = [{"messages": [USER, ASSISTANT, USER, second]}, {"prompt": [USER, ASSISTANT, USER], "completion": [second]}]
    [example], _ = encode(rows[:1], tokenizer, assistant_only_loss=True)
    assert trained_text(example, tokenizer) == "cde<|im_end|>f☕<|im_end|>"
    [example], _ = encode(rows[1:], tokenizer, assistant_only_loss=True)
    assert trained_text(example, tokenizer) == "f☕<|im_end|>"


def test_all_bytes_of_the_last_character_of_a_turn_are_trained(tokenizer):
    """transformers' own mask stops at the first token of a character that takes several."""
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}|{% endfor %}"
    rows = [{"messages": [{"role": "assistant", "content": "a☕"}, {"role": "assistant", "content": "b"}]}]
    [example], _ = encode(rows, changed(tokenizer, chat_template=template), assistant_only_loss=True)
    assert len(example.tokens) == 1 + 3 + 1 + 1 + 1
    assert trained_text(example, tokenizer) == "☕b"


def test_a_prompt_that_is_no_prefix_is_cut_where_they_part_and_told_once(tokenizer, caplog):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think></think>{% endif %}"
    )
    rows = [{"prompt": [USER], "completion": [ASSISTANT]}] * 3
    with caplog.at_level(logging.WARNING):
        examples, _ = encode(rows, changed(tokenizer, chat_template=template), max_length=None)
    assert [trained_text(example, tokenizer) for example in examples] == ["cde"] * 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("rows.jsonl: 3 of 3 prompts are not the first tokens")


def test_truncation_and_what_it_leaves_without_a_target(tokenizer):
    rows = [
        {"prompt": "ab", "completion": "cde"},
        {"prompt": "abcdef", "completion": "g"},
        {"prompt": "", "completion": "g"},
    ]
    examples, counts = encode(rows, tokenizer, max_length=4)
    assert [text_of(example, tokenizer) for example in examples] == ["abcd", "g<|im_end|>"]
    assert [trained_text(example, tokenizer) for example in examples] == ["cd", "<|im_end|>"]
    assert counts == (2, 1, 1)
    examples, counts = encode(rows, tokenizer, max_length=4, truncation_mode="keep_end")
    assert [text_of(example, tokenizer) for example in examples] == ["cde<|im_end|>", "efg<|im_end|>", "g<|im_end|>"]
    # "c" has nothing before it any more
    assert [trained_text(example, tokenizer) for example in examples] == ["de<|im_end|>", "g<|im_end|>", "<|im_end|>"]
    assert counts == (3, 0, 2)
    examples, counts = encode([{"text": "a" * 5000}], tokenizer, max_length=None)
    assert len(examples[0].tokens) == 5001 and counts == (1, 0, 0)


def test_nothing_left_to_train_on_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"rows.jsonl: none of the 2 rows .* max_length 4 \(keep_start\)"):
        encode([{"prompt": "abcdef", "completion": "g"}] * 2, tokenizer, max_length=4)


def test_tokenized_rows(tokenizer, caplog):
    row = {"input_ids": [5, 6, 7, 8]}

    def mask(columns, **options):
        [example], _ = encode([{**row, **columns}], tokenizer, **options)
        assert example.tokens.tolist() == row["input_ids"]  # no EOS is added
        return example.loss_mask.astype(int).tolist()

    completion, assistant = {"completion_mask": [0, 0, 1, 1]}, {"assistant_masks": [0, 1, 1, 0]}
    assert mask({}) == [0, 1, 1, 1]
    assert mask({"labels": [5, -100, 7, -100]}) == [0, 0, 1, 0]
    assert mask({"labels": [5, -100, 7, -100], **completion}, completion_only_loss=True) == [0, 0, 1, 0]
    assert mask(assistant) == [0, 1, 1, 0]
    assert mask({**completion, **assistant}, completion_only_loss=True) == [0, 0, 1, 0]
    assert not caplog.messages
    assert mask(completion) == [0, 1, 1, 1]
    assert "completion_mask does not count" in caplog.text


IDS = {"input_ids": [5, 6]}
LABELLED = {"input_ids": [5, 6], "labels": [5, 6]}
TEXT = {"text": "ab"}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "a", "completion": "b"}
CHAT_PAIR = {"prompt": [USER], "completion": [ASSISTANT]}


@pytest.mark.parametrize(
    ("good", "column", "bad", "message"),
    [
        (IDS, "input_ids", [5, 999], ": 999 at position 1 .from 0. is out of range 0..258"),
        (IDS, "input_ids", [5, -1], ": -1 at position 1"),
        (IDS, "input_ids", [5, 6.5], " must be a list of whole numbers"),
        (IDS, "input_ids", "56", " must be a list of whole numbers, not str '56'"),
        (LABELLED, "labels", [5, 259], ": 259 at position 1 .from 0. is out of range 0..258"),
        (LABELLED, "labels", [-100, -7], ": -7 at position 1"),
        (LABELLED, "labels", [6, 7], ": 7 at position 1 .from 0., where the token is 6"),
        (LABELLED, "labels", [5], " has 1 values for 2 input_ids"),
        (LABELLED, "labels", None, " must be a list of whole numbers, not null or missing"),
        ({**IDS, "assistant_masks": [0, 1]}, "assistant_masks", [0, 2], ": 2 at position 1"),
        (TEXT, "text", None, " must be text, not null or missing"),
        (TEXT, "text", 3, " must be text, not int 3"),
        (CHAT, "messages", [], " must be a list of messages .* not an empty list"),
        (CHAT, "messages", "hi", " must be a list of messages .* not str 'hi'"),
        (
            CHAT,
            "messages",
            [{"role": "human", "content": "x"}],
            ": message 1 has the unknown role 'human'; roles are sys",
        ),
        (CHAT, "messages", [USER, {"content": "x"}], ": message 2 has the unknown role None"),
        (CHAT, "messages", [USER, {"role": "user"}], ": the content of message 2 must be text, not null or missing"),
        (
            CHAT,
            "messages",
            [{"role": "user", "content": [1]}],
            r": the content of message 1 must be text, not list \[1\]",
        ),
        (PAIR, "completion", [ASSISTANT], " must be text, not list"),
        (CHAT_PAIR, "completion", "a", " must be a list of messages"),
        (CHAT_PAIR, "completion", None, " must be a list of messages .* not null or missing"),
    ],
)
def test_a_bad_row_is_named(good, column, bad, message, tokenizer):
    rows = [good] * 1500 + [{**good, column: bad}]
    with pytest.raises(DataError, match=f"^rows.jsonl, row 1501, column '{column}'{message}") as caught:
        encode(rows, tokenizer)
    assert "\n" not in str(caught.value)


def test_columns_that_do_not_make_a_training_row(tokenizer):
    with pytest.raises(DataError, match=r"rows.jsonl has no column 'completion' to train on"):
        encode([{"prompt": "a"}], tokenizer)
    with pytest.raises(DataError, match=r"rows.jsonl has the columns body; accepted are"):
        encode([{"body": "a"}], tokenizer)
    with pytest.raises(DataError, match=r"rows.jsonl has no rows"):
        encode([], tokenizer)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "ab"},
            {"completion_only_loss": True},
            "completion_only_loss needs columns 'prompt' and 'completion'",
        ),
        ({"text": "ab"}, {"assistant_only_loss": True}, "assistant_only_loss needs messages with roles"),
        ({"input_ids": [5, 6]}, {"assistant_only_loss": True}, "needs a column 'assistant_masks' or 'labels'"),
        ({"input_ids": [5, 6]}, {"completion_only_loss": True}, "needs a column 'completion_mask' or 'labels'"),
    ],
)
def test_options_that_do_not_fit_the_rows(row, options, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        encode([row], tokenizer, **options)


def test_a_template_must_be_there_and_have_what_is_asked_of_it(tokenizer):
    rows = [{"messages": [USER, ASSISTANT]}]
    with pytest.raises(ConfigError, match=r"no chat template.*--chat_template_path"):
        encode(rows, changed(tokenizer, chat_template=None))
    plain = changed(tokenizer, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(
        ConfigError, match=r"needs a chat template with {% generation %}; give one with --chat_template"
    ):
        encode(rows, plain, assistant_only_loss=True)
    with pytest.raises(ConfigError, match="line 1 of the chat template is not Jinja"):
        encode(rows, changed(tokenizer, chat_template="{% for m in messages %}"))


def test_messages_that_the_template_refuses_are_named(tokenizer):
    picky = changed(
        tokenizer,
        chat_template="{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system\nrole') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}",
    )
    rows = [{"messages": [USER]}, {"messages": [{"role": "system", "content": "x"}]}]
    with pytest.raises(DataError, match=r"row 2, column 'messages': the chat template refuses it: no system role"):
        encode(rows, picky)


def test_ids_beyond_the_embedding_are_refused_with_both_sizes(tokenizer):
    rows = [{"text": "!"}] * 1500 + [{"text": "~"}]
    highest = tokenizer.convert_tokens_to_ids("~")
    sizes = f"token id {highest} from a tokenizer of 259 tokens, but the model has {highest} embedding rows"
    with pytest.raises(ConfigError, match=f"rows.jsonl, row 1501: {sizes}"):
        encode_rows(rows, tokenizer, SFTDataConfig(), vocab_size=highest, name="rows.jsonl")
    assert encode_rows(rows, tokenizer, SFTDataConfig(), vocab_size=highest + 1)[1].kept == 1501
    with pytest.raises(ConfigError, match=r"padding \(--pad_token\): token id 2 .* 2 embedding rows"):
        encode_rows([{"text": "ab"}], tokenizer, SFTDataConfig(), vocab_size=2)


def test_text_needs_an_eos(tokenizer):
    with pytest.raises(ConfigError, match=r"no EOS token .*--eos_token"):
        encode([{"text": "ab"}], changed(tokenizer, eos_token=None))


def test_datasets_and_lists_give_the_same(tokenizer):
    rows = [{"prompt": [USER], "completion": [{**ASSISTANT, "content": "c" * (1 + i % 7)}]} for i in range(1203)]
    ours, counts = encode(rows, tokenizer)
    theirs, same = encode(datasets.Dataset.from_list(rows).with_format("numpy"), tokenizer)
    assert counts == same == (1203, 0, 0)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    assert [example.loss_mask.sum() for example in ours] == [1 + i % 7 + 2 for i in range(1203)]


def test_prompts_to_generate_from(tokenizer):
    def text(prompt):
        ids = encode_prompt(prompt, tokenizer, vocab_size=len(tokenizer))
        assert ids.dtype == np.int32 and ids.ndim == 1
        return tokenizer.decode(ids)

    assert text("ab") == "ab"
    assert text([USER]) == OPENING
    assert text([USER, ASSISTANT]) == OPENING + "cde"
    with pytest.raises(DataError, match=r"p.jsonl, row 4, column 'prompt' has no tokens"):
        encode_prompt("", tokenizer, vocab_size=259, name="p.jsonl", row=3)
    with pytest.raises(DataError, match=r"p.jsonl, row 4, column 'prompt' must be a list of messages"):
        encode_prompt(None, tokenizer, vocab_size=259, name="p.jsonl", row=3)
    with pytest.raises(ConfigError, match="10 embedding rows"):
        encode_prompt("ab", tokenizer, vocab_size=10)


def test_prepare_tokenizer_sets_what_the_config_names(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0]['content'] }}☕", encoding="utf-8")
    config = SFTDataConfig(eos_token="<pad>", pad_token="<|im_start|>", chat_template_path=str(path))
    prepared = prepare_tokenizer(copy.deepcopy(tokenizer), config)
    assert (prepared.eos_token, prepared.pad_token) == ("<pad>", "<|im_start|>")
    [example], _ = encode([{"messages": [USER]}], prepared)
    assert text_of(example, prepared) == "ab☕"
    kept = prepare_tokenizer(copy.deepcopy(tokenizer), SFTDataConfig())
    assert (kept.eos_token, kept.pad_token, kept.chat_template) == ("<|im_end|>", "<pad>", tokenizer.chat_template)
    assert prepare_tokenizer(changed(tokenizer, pad_token=None), SFTDataConfig()).pad_token == "<|im_end|>"


def test_prepare_tokenizer_takes_the_template_of_another_model(tokenizer, tmp_path):
    source = changed(tokenizer, chat_template="{{ messages[0]['content'] }}<pad>", eos_token="<pad>")
    source.save_pretrained(tmp_path / "other")
    config = SFTDataConfig(chat_template_path=str(tmp_path / "other"))
    prepared = prepare_tokenizer(copy.deepcopy(tokenizer), config)
    assert (prepared.chat_template, prepared.eos_token) == (source.chat_template, "<pad>")
    source.add_tokens(["<turn>"], special_tokens=True)
    source.chat_template = "<turn>{{ messages[0]['content'] }}"
    source.save_pretrained(tmp_path / "wider")
    with pytest.raises(ConfigError, match=r"needs tokens that this tokenizer lacks: \['<turn>'\]"):
        prepare_tokenizer(copy.deepcopy(tokenizer), SFTDataConfig(chat_template_path=str(tmp_path / "wider")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token": "<eos>"}, "eos_token '<eos>' is not in the tokenizer's vocabulary"),
        ({"pad_token": "<none>"}, "pad_token '<none>' is not in the tokenizer's vocabulary"),
        (
            {"chat_template_path": "./nowhere.jinja"},
            "chat_template_path './nowhere.jinja' is neither a file nor a model",
        ),
    ],
)
def test_prepare_tokenizer_refuses_what_is_not_there(options, message, tokenizer):
    with pytest.raises(ConfigError, match=message) as caught:
        prepare_tokenizer(copy.deepcopy(tokenizer), SFTDataConfig(**options))
    assert "\n" not in str(caught.value)


def test_prepare_tokenizer_needs_something_to_pad_with(tokenizer):
    with pytest.raises(ConfigError, match="neither a pad nor an EOS token"):
        prepare_tokenizer(changed(tokenizer, eos_token=None, pad_token=None), SFTDataConfig())


def test_bad_options_are_refused_at_once():
    with pytest.raises(ConfigError, match=r"truncation_mode is 'keep_strat' .did you mean 'keep_start'"):
        SFTDataConfig(truncation_mode="keep_strat")
    with pytest.raises(ConfigError, match="max_length is 1; a row needs at least 2 tokens"):
        SFTDataConfig(max_length=1)
