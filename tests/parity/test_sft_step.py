"""The first step of a run against TRL's SFTTrainer: same folder, same rows, same flags, one case a type of row."""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from jaxpost.cli import main

TEMPLATES = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
pytestmark = pytest.mark.parity

# What a step logs besides its loss, and how near it must be.
METRICS = ("grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens")
LOSS_TOLERANCE, METRICS_TOLERANCE = 1e-5, 1e-4  # relative
DEVICES = 8  # of tests/conftest.py

TOOL_TEMPLATE = (
    "{% if tools %}Tools: {% for tool in tools %}{{ tool | tojson }};{% endfor %}\n{% endif %}"
    "{% if mood is defined %}Mood: {{ mood }}{{ ', in short' if short else ', at length' }}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def exchange(number):
    """A question and its answer, of different lengths."""
    question = f"What is {number} + {number}?" + " Take your time." * (number % 4)
    answer = f"{number} + {number} = {2 * number}" + ", naïve ☕" * (number % 3) + "."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tool(name):
    parameters = {"type": "object", "properties": {"a": {"type": "number"}}}
    return {"type": "function", "function": {"name": name, "description": "Ünïcode", "parameters": parameters}}


def sharegpt(messages):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}


NUMBERS = range(16)
# One, two or three exchanges, every other time behind a system message.
MESSAGES = [
    {
        "messages": [
            *[{"role": "system", "content": "Be brief."}] * (number % 2),
            *(message for i in range(1 + number % 3) for message in exchange(number + 7 * i)),
        ]
    }
    for number in NUMBERS
]
PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in MESSAGES]
TEXTS = [[message["content"] for message in exchange(number)] for number in NUMBERS]
STANDARD = [{"prompt": question, "completion": " " + answer} for question, answer in TEXTS]
RANDOM = np.random.default_rng(0)
TOKENS = [RANDOM.integers(3, 259, size).tolist() for size in RANDOM.integers(20, 240, len(NUMBERS))]
MASKS, OTHER_MASKS = (
    [(RANDOM.random(len(ids)) < share).astype(int).tolist() for ids in TOKENS] for share in (0.5, 0.7)
)
LABELLED = [
    {"input_ids": ids, "labels": [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]}
    for ids, mask in zip(TOKENS, MASKS, strict=True)
]
MASKED = [
    {"input_ids": ids, "completion_mask": one, "assistant_masks": other}
    for ids, one, other in zip(TOKENS, MASKS, OTHER_MASKS, strict=True)
]
TOOLS = [{**row, "tools": [tool("add"), tool("double")][: 1 + i % 2]} for i, row in enumerate(MESSAGES)]
KWARGS = [{**row, "chat_template_kwargs": {"mood": "calm", "short": i % 2 == 0}} for i, row in enumerate(PAIRS)]

ASSISTANT = {"assistant_only_loss": True}
WHOLE = {"completion_only_loss": False}


def our_log(folder, rows, output_dir, **changes):
    """What jaxpost logs for the first step; two rows a device, put into one row of tokens by default."""
    data = output_dir / "rows.jsonl"
    output_dir.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = "--max_steps 1 --logging_steps 1 --per_device_train_batch_size 2 --save_strategy no --report_to none"
    # One length for all cases, so that one program is compiled for all of them.
    shared += " --pad_to_multiple_of 512"
    changes = {"max_length": 256, **changes}
    flags = [word for name, value in changes.items() for word in (f"--{name}", "null" if value is None else str(value))]
    command = ["sft", "--model_name_or_path", folder, "--dataset_name", data, "--output_dir", output_dir / "run"]
    with patch("jaxpost.record.write_curves"):  # drawing takes longer than the step
        assert main([*map(str, command), *shared.split(), "--tokenized_cache_dir", "", *flags]) == 0
    return json.loads((output_dir / "run" / "metrics.jsonl").read_text().splitlines()[0])


def trl_log(folder, rows, output_dir, **changes):
    """What TRL logs for the first step, which takes all rows at once."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2 * DEVICES,
        bf16=False,
        gradient_checkpointing=False,  # which changes nothing but the time it takes
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        **{"max_length": 256, **changes},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The eager kernel keeps packed documents apart, by their positions.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert len(trainer.get_train_dataloader()) == 1
    trainer.train()
    return trainer.state.log_history[0]


def assert_same(ours, theirs, metrics=METRICS):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=LOSS_TOLERANCE, err_msg="loss")
    for name in metrics:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=METRICS_TOLERANCE, err_msg=name)


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        pytest.param([{"text": " ".join(texts)} for texts in TEXTS], {}, id="text"),
        pytest.param([{"body": " ".join(texts)} for texts in TEXTS], {"dataset_text_field": "body"}, id="custom field"),
        pytest.param(MESSAGES, {}, id="messages"),
        pytest.param(MESSAGES, ASSISTANT, id="messages, assistant"),
        pytest.param(
            MESSAGES,
            {**ASSISTANT, "max_length": 100, "truncation_mode": "keep_end"},
            id="messages, assistant, keep_end",
        ),
        pytest.param(MESSAGES, {**ASSISTANT, "chat_template_path": f"{TEMPLATES}/llama3.jinja"}, id="messages, llama3"),
        pytest.param(MESSAGES, {"padding_free": False}, id="messages, padded"),
        pytest.param(STANDARD, {}, id="standard pairs"),
        pytest.param(STANDARD, WHOLE, id="standard pairs, whole"),
        pytest.param(PAIRS, {}, id="pairs"),
        pytest.param(PAIRS, WHOLE, id="pairs, whole"),
        pytest.param(PAIRS, {"max_length": 100}, id="pairs, some without a completion"),
        pytest.param(PAIRS, {"loss_type": "dft"}, id="pairs, dft"),
        pytest.param(PAIRS, ASSISTANT, id="pairs, completion and assistant"),
        pytest.param(PAIRS, {**ASSISTANT, **WHOLE}, id="pairs, assistant"),
        pytest.param(LABELLED, {}, id="labels"),
        pytest.param(MASKED, {}, id="assistant_masks"),
        pytest.param(MASKED, {"completion_only_loss": True}, id="completion_mask and assistant_masks"),
        pytest.param(TOOLS, {}, id="tools"),
        pytest.param(KWARGS, {}, id="chat_template_kwargs"),
    ],
)
def test_first_step_equals_trl(tiny_folder, rows, flags, tmp_path):
    if {"tools", "chat_template_kwargs"} & rows[0].keys():
        (tmp_path / "tools.jinja").write_text(TOOL_TEMPLATE)
        flags = {**flags, "chat_template_path": f"{tmp_path}/tools.jinja"}
    ours = our_log(tiny_folder, rows, tmp_path / "ours", **flags)
    assert_same(ours, trl_log(tiny_folder, rows, tmp_path / "theirs", **flags))


def test_sharegpt_rows_equal_trl_on_messages(tiny_folder, tmp_path):
    """TRL renames `from` and `value`, but leaves human and gpt as roles of their own."""
    ours = our_log(tiny_folder, [sharegpt(row["messages"]) for row in MESSAGES], tmp_path / "ours", **ASSISTANT)
    assert_same(ours, trl_log(tiny_folder, MESSAGES, tmp_path / "theirs", **ASSISTANT))


def test_rows_in_one_row_equal_trl_padding_free(tiny_folder, tmp_path):
    ours = our_log(tiny_folder, MESSAGES, tmp_path / "ours", max_length=None, **ASSISTANT)
    theirs = trl_log(tiny_folder, MESSAGES, tmp_path / "theirs", max_length=None, padding_free=True, **ASSISTANT)
    assert_same(ours, theirs)
