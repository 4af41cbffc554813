"""The token ids and labels of `encode_rows` against those that TRL's SFTTrainer prepares from the same rows."""

import numpy as np
import pytest

from jaxpost.data.chat import SFTDataConfig, encode_rows

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
    examples, counts = encode_rows(rows, tokenizer, SFTDataConfig(**options), vocab_size=len(tokenizer))
    assert counts.kept == len(expected)
    assert counts.dropped == len(rows) - len(expected)
    for example, (input_ids, labels) in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(example.tokens, input_ids)
        # TRL shifts the labels in the model, so its first label never counts; ours is never set.
        trained = np.where(example.loss_mask, example.tokens, -100)
        np.testing.assert_array_equal(trained[1:], labels[1:])
        assert not example.loss_mask[0]
