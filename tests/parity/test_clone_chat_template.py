"""A cloned chat template against `trl.clone_chat_template`, and a fine-tuned folder against transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken

from jaxpost import from_pretrained, save_pretrained
from jaxpost.cli import main
from jaxpost.data.tokenizer import clone_chat_template, embedding_rows
from jaxpost.models.resize import resize_embeddings
from tests.conftest import make_model, make_tokenizer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['role'] }}|{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant|{% endif %}"
)
FEW = ["<turn>", "<end>"]
MANY = ["<turn>", *(f"<tool_{n}>" for n in range(70)), "<end>"]


@pytest.fixture(scope="module", params=[FEW, MANY], ids=["few", "many"])
def other(request, tmp_path_factory):
    """Another model's tokenizer: with its own template, EOS and added tokens of several kinds."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in request.param])
    tokenizer.add_tokens([AddedToken(" word", lstrip=True, single_word=True), "<extra_id_3>"])
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<end>"
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return str(folder)


def base(folder, tokenizer, **changes):
    """The folder of a tiny model with `changes` to its config."""
    save_pretrained(make_model(**changes), tokenizer, folder, generation_config={"eos_token_id": [1, 5]})
    return folder


def clone_with_trl(folder, other, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import clone_chat_template as clone

    return clone(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), other, **options)


@pytest.mark.parametrize("multiple", [64, 5, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [259, 262, 320])
def test_same_ids_sizes_template_and_eos_as_trl(vocab_size, tied, multiple, other, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra_id_0>", "<end>"][: vocab_size - 259])
    folder = base(tmp_path / "base", tokenizer, vocab_size=vocab_size, tie_word_embeddings=tied)
    theirs, their_tokenizer, their_ids = clone_with_trl(folder, other, resize_to_multiple_of=multiple)
    assert sorted(clone_chat_template(tokenizer, other, multiple)) == sorted(their_ids)
    assert tokenizer.get_vocab() == their_tokenizer.get_vocab()
    assert {id: repr(token) for id, token in tokenizer.added_tokens_decoder.items()} == {
        id: repr(token) for id, token in their_tokenizer.added_tokens_decoder.items()
    }
    assert tokenizer.chat_template == their_tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (their_tokenizer.eos_token, their_tokenizer.eos_token_id)
    chat = [{"role": "user", "content": "a word"}, {"role": "assistant", "content": "<tool_3>"}]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == their_tokenizer.apply_chat_template(chat)["input_ids"]

    ours = from_pretrained(folder)
    resize_embeddings(ours, embedding_rows(tokenizer, vocab_size, multiple))
    rows = max(vocab_size, theirs.vocab_size)  # TRL cuts an embedding that is larger than the tokenizer
    assert ours.config.vocab_size == rows
    np.testing.assert_array_equal(
        ours.embed.embedding[...][:vocab_size][: theirs.vocab_size],
        theirs.get_input_embeddings().weight.detach().numpy()[:vocab_size],
    )


def test_a_run_with_a_cloned_template_is_a_model_for_transformers(other, tmp_path):
    folder = base(tmp_path / "base", make_tokenizer(), vocab_size=259, tie_word_embeddings=False)
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(8)
    ]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"sft --model_name_or_path {folder} --dataset_name {data} --output_dir {out} --report_to none"
    flags = f"--chat_template_path {other} --max_steps 80 --learning_rate 1e-2 --save_strategy no"
    assert main([*command.split(), *flags.split(), "--per_device_train_batch_size", "1"]) == 0

    script = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'say 3'}]\n"
        "prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt')\n"
        "ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt['input_ids'].shape[1] :]\n"
        "rows = model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]\n"
        "print(len(tokenizer), *rows, model.generation_config.eos_token_id, model.config.eos_token_id, ids.tolist())\n"
        "print(tokenizer.decode(ids, skip_special_tokens=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if line and "Loading weights" not in line]
    assert not complaints
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    end, size = tokenizer.convert_tokens_to_ids("<end>"), len(tokenizer)
    ends = [end, 1, 5]
    facts, text = done.stdout.splitlines()
    assert size % 64 == 0
    assert facts.startswith(f"{size} {size} {size} {ends} {ends} ")
    assert text == "yes"
    assert facts.endswith(f", {end}]")  # it stopped there

    prompts, completions = tmp_path / "prompts.jsonl", tmp_path / "completions.jsonl"
    prompts.write_text(json.dumps({"prompt": rows[3]["messages"][:1]}) + "\n")
    command = f"generate --model_name_or_path {out} --dataset_name {prompts} --output_file {completions}"
    assert main([*command.split(), "--temperature", "0", "--max_new_tokens", "20"]) == 0
    completion = json.loads(completions.read_text())
    assert (completion["completion"], completion["completion_ids"][-1]) == ("yes", end)
