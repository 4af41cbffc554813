"""The token ids and labels of `encode_rows` against those that TRL's SFTTrainer prepares from the same rows.

Also against the templates that TRL brings: those of real models, and its twins of them with {% generation %}.
"""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxpost.data.chat import SFTDataConfig, encode_prompt, encode_rows
from jaxpost.data.examples import Counts

TEMPLATES = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"

pytestmark = pytest.mark.parity

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [
    ("What is 2 + 2?", "It is 4."),
    ("  Spaces first, naïve café ☕", "trailing newline\n"),
    ("A long one: " + "count " * 30, "one two three " * 20),
    ("Ends with the token<|im_end|>", "so does this<|im_end|>"),
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TEXT_ROWS = [{"text": f"{q} {a}"} for q, a in TURNS]
CUSTOM_ROWS = [{"body": f"{q} {a}"} for q, a in TURNS]
# Prompts that end in the middle of a word: its tokens merge with those of the completion.
PAIR_ROWS = [{"prompt": q, "completion": " " + a} for q, a in TURNS] + [{"prompt": "coun", "completion": "t count"}]
MESSAGE_ROWS = [{"messages": [{"role": "system", "content": "Be brief."}, user(q), assistant(a)]} for q, a in TURNS] + [
    {"messages": [user("a"), assistant("b ☕"), user("c"), assistant("d")]}
]
CHAT_PAIR_ROWS = [{"prompt": [user(q)], "completion": [assistant(a)]} for q, a in TURNS] + [
    {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
]
TOKENIZED_ROWS = [
    {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
    {"input_ids": [9, 10, 11], "completion_mask": [0, 1, 0]},
]
LABELLED_ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10], "labels": [9, 10]}]


SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL_TURNS = [user("2 + 2?"), {**assistant("Well."), "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
TOOL_ROWS = [
    {"messages": [*TOOL_TURNS, assistant("4.")], "tools": json.dumps([SCHEMA])},
    {"messages": [user("Hello"), assistant("Hi.")], "tools": json.dumps([SCHEMA])},
]
TOOL_PAIR_ROWS = [
    {"prompt": TOOL_TURNS, "completion": [assistant("4.")], "tools": [SCHEMA]},
    {"prompt": [user("2 + 2?")], "completion": [{**assistant(""), "tool_calls": [CALL]}], "tools": [SCHEMA]},
]
QUIET_ROWS = [
    {**row, "chat_template_kwargs": {"enable_thinking": thinks}} for row in CHAT_PAIR_ROWS for thinks in (0, 1)
]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with some merges, BOS in front of standard text, and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|bos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([q + " " + a for q, a in TURNS], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    return fast


def prepare_with_trl(rows, tokenizer, output_dir, **options):
    """TRL's (input_ids, labels) of each row."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    config = SFTConfig(output_dir=str(output_dir), use_cpu=True, bf16=False, report_to=[], **options)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        pytest.param(TEXT_ROWS, {}, id="text"),
        pytest.param(CUSTOM_ROWS, {"dataset_text_field": "body"}, id="custom field"),
        pytest.param(PAIR_ROWS, {}, id="prompt-completion"),
        pytest.param(PAIR_ROWS, {"completion_only_loss": False}, id="prompt-completion, all trained"),
        pytest.param(MESSAGE_ROWS, {}, id="messages"),
        pytest.param(MESSAGE_ROWS, {"assistant_only_loss": True}, id="messages, assistant only"),
        pytest.param(CHAT_PAIR_ROWS, {}, id="conversational prompt-completion"),
        pytest.param(CHAT_PAIR_ROWS, {"assistant_only_loss": True}, id="completion and assistant only"),
        pytest.param(
            CHAT_PAIR_ROWS, {"assistant_only_loss": True, "completion_only_loss": False}, id="pairs, assistant only"
        ),
        pytest.param(CHAT_PAIR_ROWS, {"max_length": 60}, id="keep_start"),
        pytest.param(CHAT_PAIR_ROWS, {"max_length": 60, "truncation_mode": "keep_end"}, id="keep_end"),
        pytest.param(CHAT_PAIR_ROWS, {"max_length": None}, id="no limit"),
        pytest.param(TOKENIZED_ROWS, {}, id="completion_mask alone"),
        pytest.param(TOKENIZED_ROWS, {"completion_only_loss": True}, id="completion_mask asked for"),
        pytest.param(LABELLED_ROWS, {}, id="labels"),
    ],
)
def test_same_ids_and_labels_as_trl(rows, options, tokenizer, tmp_path):
    expected = prepare_with_trl(rows, tokenizer, tmp_path, **options)
    counts, vocab_size = Counts(), len(tokenizer)
    examples = list(encode_rows(rows, tokenizer, SFTDataConfig(**options), vocab_size=vocab_size, counts=counts))
    assert counts.kept == len(expected)
    assert counts.dropped == len(rows) - len(expected)
    for example, (input_ids, labels) in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(example.tokens, input_ids)
        # TRL shifts the labels in the model, so its first label never counts; ours is never set.
        trained = np.where(example.loss_mask, example.tokens, -100)
        np.testing.assert_array_equal(trained[1:], labels[1:])
        assert not example.loss_mask[0]


@pytest.mark.parametrize(
    ("rows", "template", "options"),
    [
        pytest.param(TOOL_ROWS, "qwen3", {}, id="tools, messages"),
        pytest.param(TOOL_PAIR_ROWS, "qwen3", {}, id="tools, pairs"),
        pytest.param(TOOL_ROWS, "qwen2_5_training", {"assistant_only_loss": True}, id="tools, assistant only"),
        pytest.param(TOOL_ROWS, "llama3_1", {}, id="tools, of Llama"),
        pytest.param(QUIET_ROWS, "qwen3", {}, id="chat_template_kwargs"),
    ],
)
def test_same_with_tools_and_template_kwargs(rows, template, options, tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, template)
    expected = prepare_with_trl(rows, tokenizer, tmp_path, **options)
    examples = encode_rows(rows, tokenizer, SFTDataConfig(**options), vocab_size=len(tokenizer))
    for row, example, (input_ids, labels) in zip(rows, examples, expected, strict=True):
        np.testing.assert_array_equal(example.tokens, input_ids)
        np.testing.assert_array_equal(np.where(example.loss_mask, example.tokens, -100)[1:], labels[1:])
        messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        given = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
        schemas = json.loads(given["tools"]) if isinstance(given.get("tools"), str) else given.get("tools")
        kwargs = {"tools": schemas, **given.get("chat_template_kwargs", {}), "return_dict": False}
        np.testing.assert_array_equal(example.tokens, tokenizer.apply_chat_template(messages, **kwargs))
        prompt = encode_prompt(messages[:1], tokenizer, vocab_size=len(tokenizer), **given)
        asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, **kwargs)
        np.testing.assert_array_equal(prompt, asked)


# Not GLM 4, whose twin adds the end token that GLM itself leaves to the next message; nor templates of vision models
# that want a content in parts, which is no text.
OTHERS = {"glm4moe", "idefics3", "llava_next", "smolvlm"}
FAMILIES = sorted({path.stem.removesuffix("_training") for path in TEMPLATES.glob("*_training.jinja")} - OTHERS)
TALKS = [
    [user("q"), assistant("a")],
    [user("q"), assistant("<b>a</b>\n"), user("q ☕"), assistant(" b ☕")],
    [
        {"role": "system", "content": "s"},
        user("q"),
        assistant("a"),
        user("q"),
        assistant("b"),
        user("q"),
        assistant("c"),
    ],
    [user("q"), {**assistant("a"), "reasoning_content": "r"}, user("q"), {**assistant("b"), "reasoning_content": "s"}],
    [user("q"), assistant("<think>\nr\n</think>\n\na"), user("q"), assistant("<think>\ns\n</think>\n\nb")],
    [*TOOL_TURNS, assistant("a")],
    [user("q"), {**assistant(""), "tool_calls": [CALL, CALL]}, TOOL_TURNS[2], TOOL_TURNS[2], assistant("a")],
    [user("q"), {**assistant(""), "tool_calls": [CALL]}, TOOL_TURNS[2], assistant("a"), user("q"), assistant("b")],
    [user("q"), assistant("a"), user("q")],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_turns_as_the_markers_of_trl(family, tokenizer):
    """A template as its model has it, and TRL's twin with {% generation %}, wherever they write the same text.

    Many of TRL's markers begin before generation would: with the header, or with the `<think>` that a prompt ends with.
    That is taken off what is expected; it is no part of what the model has to say.
    """
    plain, twin = with_template(tokenizer, family), with_template(tokenizer, f"{family}_training")
    compared = 0
    for messages in TALKS:
        if family == "diffusion_gemma" and any(message["role"] == "tool" for message in messages):
            continue  # its prompt after a tool has no header
        try:
            marked = twin.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            ids = plain.apply_chat_template(messages, return_dict=False)
        except Exception:  # the family has no such conversations
            continue
        if ids == marked["input_ids"]:
            compared += 1
            expected = np.array(marked["assistant_masks"], bool)
            turns = np.flatnonzero(np.diff(expected.astype(int)) == 1) + 1
            asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            for start, i in zip(turns, asked, strict=True):
                before = plain.apply_chat_template(messages[:i], return_dict=False)
                prompt = plain.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
                header = prompt[shared_length(before, prompt) :]
                begin = start - max(n for n in range(len(header) + 1) if ids[start - n : start] == header[:n])
                is_prefix = ids[: len(prompt)] == prompt
                expected[start : len(prompt) if is_prefix else begin + shared_length(header, ids[begin:])] = False
            config = SFTDataConfig(assistant_only_loss=True, max_length=None)
            [example] = encode_rows([{"messages": messages}], plain, config, vocab_size=len(plain))
            np.testing.assert_array_equal(example.tokens, ids)
            np.testing.assert_array_equal(example.loss_mask, expected, err_msg=str(messages))
    assert compared


def with_template(tokenizer, name):
    """A copy with a template of TRL's and the special tokens that it writes."""
    other, template = copy.deepcopy(tokenizer), (TEMPLATES / f"{name}.jinja").read_text()
    special = r"<[|\uff5c][^<>\s'\"]*[|\uff5c]>|<(?:start|end)_of_\w+>|<turn\|>"  # DeepSeek's bars are full-width
    other.add_tokens(sorted(set(re.findall(special, template))), special_tokens=True)
    other.add_tokens(["<think>", "</think>"])
    other.chat_template = template
    return other


def shared_length(one, other):
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
