"""Rows to tokens and loss masks, against ids and masks worked out by hand from the template."""

import copy
import logging

import datasets
import numpy as np
import pytest

from jaxpost.data.chat import SFTDataConfig, encode_prompt, encode_rows
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
PAIR = {"prompt": "ab", "completion": "cde"}
CHAT_PAIR = {"prompt": [USER], "completion": [ASSISTANT]}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte: 259 ids."""
    return changed(make_tokenizer(), chat_template=CHATML)


def encode(rows, tokenizer, **options):
    return encode_rows(rows, tokenizer, SFTDataConfig(**options), vocab_size=len(tokenizer), name="rows.jsonl")


def texts(rows, tokenizer, **options):
    """The whole text and the trained text of each row."""
    examples, _ = encode(rows, tokenizer, **options)
    return [(tokenizer.decode(tokens), tokenizer.decode(tokens[loss_mask])) for tokens, loss_mask in examples]


def changed(tokenizer, **attributes):
    """A copy of the shared tokenizer with other attributes."""
    other = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize("column", ["text", "body"])
def test_text_ends_with_one_eos_whatever_the_column(column, tokenizer):
    rows = [{column: "abc"}, {column: "abc<|im_end|>"}]
    examples, counts = encode(rows, tokenizer, dataset_text_field=column)
    assert counts == (2, 0, 0)
    for tokens, loss_mask in examples:
        assert tokenizer.decode(tokens) == "abc<|im_end|>"
        assert tokens.dtype == np.int32 and loss_mask.dtype == bool
        assert loss_mask.tolist() == [False, True, True, True]


def test_messages_go_through_the_template_and_are_trained_throughout(tokenizer):
    [(whole, trained)] = texts([{"messages": [USER, ASSISTANT]}], tokenizer)
    assert (whole, trained) == (WHOLE, WHOLE.removeprefix("<|im_start|>"))


def test_only_the_completion_is_trained(tokenizer):
    assert texts([CHAT_PAIR], tokenizer) == [(WHOLE, "cde<|im_end|>\n")]
    assert texts([PAIR], tokenizer) == [("abcde<|im_end|>", "cde<|im_end|>")]
    assert texts([PAIR], tokenizer, completion_only_loss=False) == [("abcde<|im_end|>", "bcde<|im_end|>")]
    with pytest.raises(DataError, match="row 1, column 'completion' is empty"):
        texts([{"prompt": "ab", "completion": ""}], tokenizer)


def test_special_tokens_of_the_tokenizer_go_around_text_only(tokenizer):
    """A template writes its own; standard text gets those that the tokenizer puts in front."""
    from tokenizers.processors import TemplateProcessing

    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 2)])
    assert texts([PAIR], starting) == [("<pad>abcde<|im_end|>", "cde<|im_end|>")]
    assert texts([CHAT_PAIR], starting)[0][0] == texts([CHAT_PAIR], starting, assistant_only_loss=True)[0][0] == WHOLE
    assert encode_prompt("ab", starting, vocab_size=259)[0] == 2
    assert starting.decode(encode_prompt([USER], starting, vocab_size=259)) == OPENING


def test_only_assistant_turns_are_trained(tokenizer):
    last = {"role": "assistant", "content": "f☕"}
    chat = {"messages": [USER, ASSISTANT, USER, last]}
    assert texts([chat], tokenizer, assistant_only_loss=True)[0][1] == "cde<|im_end|>f☕<|im_end|>"
    pair = {"prompt": [USER, ASSISTANT, USER], "completion": [last]}
    assert texts([pair], tokenizer, assistant_only_loss=True)[0][1] == "f☕<|im_end|>"


def test_all_bytes_of_the_last_character_of_a_turn_are_trained(tokenizer):
    """transformers' own mask stops at the first token of a character that takes several."""
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}|{% endfor %}"
    rows = [{"messages": [{"role": "assistant", "content": "a☕"}, {"role": "assistant", "content": "b"}]}]
    found = texts(rows, changed(tokenizer, chat_template=template), assistant_only_loss=True)
    assert found == [("a☕|b|", "☕b")]


def test_a_prompt_that_is_no_prefix_is_cut_where_they_part_and_told_once(tokenizer, caplog):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think></think>{% endif %}"
    )
    with caplog.at_level(logging.WARNING):
        found = texts([CHAT_PAIR] * 3, changed(tokenizer, chat_template=template))
    assert [trained for _, trained in found] == ["cde"] * 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("rows.jsonl: 3 of 3 prompts are not the first tokens")


def test_truncation_and_what_it_leaves_without_a_target(tokenizer):
    rows = [PAIR, {"prompt": "abcdef", "completion": "g"}, {"prompt": "", "completion": "g"}]
    assert texts(rows, tokenizer, max_length=4) == [("abcd", "cd"), ("g<|im_end|>", "<|im_end|>")]
    assert encode(rows, tokenizer, max_length=4)[1] == (2, 1, 1)
    end = {"max_length": 4, "truncation_mode": "keep_end"}
    # the first token left has nothing before it any more
    cut = [("cde<|im_end|>", "de<|im_end|>"), ("efg<|im_end|>", "g<|im_end|>"), ("g<|im_end|>", "<|im_end|>")]
    assert texts(rows, tokenizer, **end) == cut
    assert encode(rows, tokenizer, **end)[1] == (3, 0, 2)
    [(tokens, _)], counts = encode([{"text": "a" * 5000}], tokenizer, max_length=None)
    assert len(tokens) == 5001 and counts == (1, 0, 0)


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


def test_bad_options_are_refused_at_once():
    with pytest.raises(ConfigError, match=r"truncation_mode is 'keep_strat' .did you mean 'keep_start'"):
        SFTDataConfig(truncation_mode="keep_strat")
    with pytest.raises(ConfigError, match="max_length is 1; a row needs at least 2 tokens"):
        SFTDataConfig(max_length=1)
