"""Rows to tokens and loss masks, against ids and masks worked out by hand from the template."""

import copy
import logging

import datasets
import numpy as np
import pytest

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.chat import SFTDataConfig, encode_prompt, encode_rows
from jaxpost.data.examples import Counts
from jaxpost.errors import ConfigError, DataError
from tests.conftest import make_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
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


def encode(rows, tokenizer, bad_rows=None, vocab_size=None, **options):
    """Tokens and masks of all examples, and their counts."""
    config, counts, vocab_size = SFTDataConfig(**options), Counts(), vocab_size or len(tokenizer)
    found = encode_rows(
        rows, tokenizer, config, vocab_size=vocab_size, name="rows.jsonl", bad_rows=bad_rows, counts=counts
    )
    return [(example.tokens, example.loss_mask) for example in found], counts


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
    assert counts == Counts(kept=2)
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


def test_only_assistant_turns_are_trained_without_generation_markers(tokenizer):
    plain = changed(tokenizer, chat_template=PLAIN)
    last = {"role": "assistant", "content": "f☕"}
    chat = {"messages": [USER, ASSISTANT, USER, last]}
    [(whole, trained)] = texts([chat], plain, assistant_only_loss=True)
    assert (whole, trained) == (texts([chat], tokenizer)[0][0], "cde<|im_end|>\nf☕<|im_end|>\n")
    pair = {"prompt": [USER, ASSISTANT, USER], "completion": [last]}
    assert texts([pair], plain, assistant_only_loss=True)[0][1] == "f☕<|im_end|>\n"
    both = texts([pair], plain, assistant_only_loss=True, completion_only_loss=False)
    assert both[0][1] == "cde<|im_end|>\nf☕<|im_end|>\n"


@pytest.mark.parametrize("template", ["marked", "plain"])
def test_a_row_without_an_assistant_is_dropped(template, tokenizer):
    tokenizer = tokenizer if template == "marked" else changed(tokenizer, chat_template=PLAIN)
    rows = [{"messages": [USER]}, {"messages": [USER, ASSISTANT]}]
    examples, counts = encode(rows, tokenizer, assistant_only_loss=True)
    assert counts == Counts(kept=1, dropped=1) and len(examples) == 1


def test_a_turn_that_cannot_be_told_is_one_bad_row(tokenizer):
    """Where a turn begins in the text depends on how many follow."""
    counted = "message['content'] ~ (messages | length if messages | length > 2 else '') + '<|im_end|>'"
    counting = changed(tokenizer, chat_template=PLAIN.replace("message['content'] + '<|im_end|>'", counted))
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER]}]
    with pytest.raises(
        DataError, match=r"row 2, .* where a message begins and ends \(message 1, user\); give a template"
    ):
        encode(rows, counting, assistant_only_loss=True)
    bad_rows = BadRows("skip")
    assert encode(rows, counting, bad_rows, assistant_only_loss=True)[1] == Counts(kept=1)
    assert bad_rows.counts.total() == 1


def test_tools_and_template_kwargs_reach_the_template(tokenizer):
    using = changed(tokenizer, chat_template="{{ style }}{% for t in tools %}[{{ t.name }}]{% endfor %}" + CHATML)
    given = {"tools": [{"name": "f"}], "chat_template_kwargs": {"style": "brief"}}
    for cells in (given, {**given, "tools": '[{"name": "f"}]'}):
        [(whole, trained)] = texts([{"messages": [USER, ASSISTANT], **cells}, {**CHAT_PAIR, **cells}][:1], using)
        assert whole == "brief[f]" + WHOLE and trained == whole[1:]
        assert texts([{**CHAT_PAIR, **cells}], using) == [("brief[f]" + WHOLE, "cde<|im_end|>\n")]
        ids = encode_prompt([USER], using, vocab_size=259, **cells)
        assert using.decode(ids) == "brief[f]" + OPENING
    with pytest.raises(DataError, match="row 2, column 'tools' must be a list of JSON schemas, or its JSON, not int 5"):
        encode([CHAT_PAIR, {**CHAT_PAIR, "tools": 5}], using)
    with pytest.raises(DataError, match=r"p.jsonl, row 4, column 'chat_template_kwargs' must be an object, not int 5"):
        encode_prompt([USER], using, vocab_size=259, name="p.jsonl", row=3, chat_template_kwargs=5)


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
    assert encode(rows, tokenizer, max_length=4)[1] == Counts(kept=2, dropped=1, truncated=1)
    end = {"max_length": 4, "truncation_mode": "keep_end"}
    # the first token left has nothing before it any more
    cut = [("cde<|im_end|>", "de<|im_end|>"), ("efg<|im_end|>", "g<|im_end|>"), ("g<|im_end|>", "<|im_end|>")]
    assert texts(rows, tokenizer, **end) == cut
    assert encode(rows, tokenizer, **end)[1] == Counts(kept=3, truncated=2)
    [(tokens, _)], counts = encode([{"text": "a" * 5000}], tokenizer, max_length=None)
    assert len(tokens) == 5001 and counts == Counts(kept=1)


def test_long_rows_are_dropped_or_refused(tokenizer):
    rows = [{"text": "abc"}, {"text": "abcdef"}, {"text": "abcdefg"}, {"text": "ab"}]
    examples, counts = encode(rows, tokenizer, max_length=4, on_long_row="drop")
    assert [len(tokens) for tokens, _ in examples] == [4, 3] and counts == Counts(kept=2, too_long=2)
    fault = "rows.jsonl, row 2 has 7 tokens, more than max_length 4; raise --max_length, or set --on_long_row to trun"
    with pytest.raises(DataError, match=fault):
        encode(rows, tokenizer, max_length=4, on_long_row="error")
    bad_rows = BadRows("skip")
    assert encode(rows, tokenizer, bad_rows, max_length=4, on_long_row="error")[1] == Counts(kept=2)
    assert bad_rows.counts == {"more tokens than max_length": 2}
    with pytest.raises(DataError, match=r"none of the 2 rows .*; 2 rows skipped: 2 x more tokens than max_length"):
        encode(rows[1:3], tokenizer, BadRows("skip"), max_length=4, on_long_row="error")


def test_nothing_left_to_train_on_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"rows.jsonl: none of the 2 rows .* max_length 4 \(keep_start\)"):
        encode([{"prompt": "abcdef", "completion": "g"}] * 2, tokenizer, max_length=4)


def test_rows_are_read_as_examples_are_taken(tokenizer):
    read, counts = [], Counts()

    def rows():
        for i in range(3000):
            read.append(i)
            yield {"text": "abc"}

    examples = encode_rows(rows, tokenizer, SFTDataConfig(), vocab_size=259, counts=counts)
    assert not read
    next(examples)
    assert len(read) == 1000 and counts == Counts(kept=1)
    assert sum(1 for _ in examples) == 2999 and len(read) == 3000 and counts == Counts(kept=3000)


def test_tokenized_rows(tokenizer, caplog):
    row = {"input_ids": [5, 6, 7, 8]}

    def mask(columns, **options):
        [example], _ = encode([{**row, **columns}], tokenizer, **options)
        tokens, loss_mask = example
        assert tokens.tolist() == row["input_ids"]  # no EOS is added
        return loss_mask.astype(int).tolist()

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


def test_a_template_must_be_there_and_be_jinja(tokenizer):
    rows = [{"messages": [USER, ASSISTANT]}]
    with pytest.raises(ConfigError, match=r"no chat template.*--chat_template_path"):
        encode(rows, changed(tokenizer, chat_template=None))
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


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        ({"text": "ab"}, {"other": "ab"}, "column 'text' must be text, not null or missing"),
        ({"text": "ab"}, {"text": None}, "column 'text' must be text, not null or missing"),
        ({"text": "ab"}, {"text": 5}, "column 'text' must be text, not int 5"),
        ({"text": "ab"}, {"text": "ab " * 4_000_000}, "column 'text' has more than 10,000,000 characters: 12,000,000"),
        ({"text": "ab"}, {"text": "a\ud800"}, "column 'text' has half of a character (a surrogate): '\\ud800'"),
        (PAIR, {**PAIR, "prompt": "\udfff"}, "column 'completion' has half of a character (a surrogate): '\\udfff'"),
        (
            CHAT_PAIR,
            {**CHAT_PAIR, "completion": [USER]},
            "column 'completion' must begin with a message of the assistant",
        ),
        (CHAT_PAIR, {**CHAT_PAIR, "completion": [{**ASSISTANT, "content": ""}]}, "column 'completion' is empty"),
        (CHAT_PAIR, {**CHAT_PAIR, "prompt": [{**USER, "role": "king"}]}, "column 'prompt': unknown role 'king'"),
        (
            CHAT_PAIR,
            {**CHAT_PAIR, "prompt": [{**USER, "content": "a\ud800"}]},
            "column 'completion' has half of a char",
        ),
        (
            {"input_ids": [5, 6], "labels": [5, 6]},
            {"input_ids": [5, 6], "labels": [5, -1]},
            "column 'labels': a value is",
        ),
        ({"input_ids": [5, 6]}, {"input_ids": [5, 600]}, "column 'input_ids': a value is out of range 0..258, 600 at"),
    ],
)
def test_bad_cells_name_the_row_or_are_left_out(good, bad, fault, tokenizer):
    with pytest.raises(DataError) as error:
        encode([good, bad], tokenizer)
    assert str(error.value).startswith(f"rows.jsonl, row 2, {fault}")
    bad_rows = BadRows("skip")
    assert encode([good, bad, good], tokenizer, bad_rows)[1] == Counts(kept=2)
    assert bad_rows.counts.total() == 1


def test_ids_beyond_the_embedding_are_refused_with_both_sizes(tokenizer):
    rows = [{"text": "!"}] * 1500 + [{"text": "~"}]
    highest = tokenizer.convert_tokens_to_ids("~")
    sizes = f"token id {highest} from a tokenizer of 259 tokens, but the model has {highest} embedding rows"
    with pytest.raises(ConfigError, match=f"rows.jsonl, row 1501: {sizes}"):
        encode(rows, tokenizer, vocab_size=highest)
    assert encode(rows, tokenizer, vocab_size=highest + 1)[1].kept == 1501
    with pytest.raises(ConfigError, match=r"padding \(--pad_token\): token id 2 .* 2 embedding rows"):
        encode([{"text": "ab"}], tokenizer, vocab_size=2)


def test_text_needs_an_eos(tokenizer):
    with pytest.raises(ConfigError, match=r"no EOS token .*--eos_token"):
        encode([{"text": "ab"}], changed(tokenizer, eos_token=None))


def test_datasets_and_lists_give_the_same(tokenizer):
    rows = [{"prompt": [USER], "completion": [{**ASSISTANT, "content": "c" * (1 + i % 7)}]} for i in range(1203)]
    ours, counts = encode(rows, tokenizer)
    theirs, same = encode(datasets.Dataset.from_list(rows).with_format("numpy"), tokenizer)
    assert counts == same == Counts(kept=1203)
    for one, other in zip(ours, theirs, strict=True):
        for part, expected in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, expected)
    assert [loss_mask.sum() for _, loss_mask in ours] == [1 + i % 7 + 2 for i in range(1203)]


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
    with pytest.raises(ConfigError, match=r"on_long_row is 'dorp' .did you mean 'drop'"):
        SFTDataConfig(on_long_row="dorp")
    with pytest.raises(ConfigError, match="max_length is 1; a row needs at least 2 tokens"):
        SFTDataConfig(max_length=1)
