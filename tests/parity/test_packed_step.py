"""First steps that TRL has wrong or refuses, against their documents, each alone in a plain transformers model."""

import math
from itertools import pairwise

import pytest

from tests.conftest import CHATML
from tests.parity.test_sft_step import ASSISTANT, MESSAGES, assert_same, our_log, trl_log

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

CAPACITY = 180  # some conversations are longer


def by_document(folder, documents):
    """What a step logs for documents of (token ids, which of them are trained), one after the other, none padded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    count = sum(sum(mask[1:]) for _, mask in documents)
    sums = {"loss": 0.0, "entropy": 0.0, "mean_token_accuracy": 0.0}
    for ids, mask in documents:
        tokens, trained = torch.tensor([ids]), torch.tensor(mask[1:]) == 1
        logps = model(tokens).logits[0, :-1][trained].log_softmax(-1)
        targets = tokens[0, 1:][trained]
        loss = torch.nn.functional.nll_loss(logps, targets, reduction="sum") / count
        loss.backward()
        sums["loss"] += loss.item()
        sums["entropy"] -= (logps.exp() * logps).sum().item() / count
        sums["mean_token_accuracy"] += (logps.argmax(-1) == targets).sum().item() / count
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    return {**sums, "grad_norm": norm.item(), "num_tokens": sum(len(ids) for ids, _ in documents)}


def tokenize(folder, template=None):
    """The conversations as (token ids, which of them the template marks), by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats, options = [row["messages"] for row in MESSAGES], {"return_dict": True, "return_assistant_tokens_mask": True}
    found = tokenizer.apply_chat_template(chats, chat_template=template, **options)
    return list(zip(found["input_ids"], found["assistant_masks"], strict=True))


def pieces(documents, strategy):
    """The documents as a strategy cuts them: bfd keeps what fits, bfd_split goes on, wrapped cuts the whole stream."""
    begin = 0
    for ids, mask in documents:
        first = CAPACITY - begin % CAPACITY if strategy == "wrapped" else CAPACITY
        cuts = [0, *range(first, len(ids), CAPACITY), len(ids)]
        for start, stop in list(pairwise(cuts))[: 1 if strategy == "bfd" else None]:
            yield ids[start:stop], mask[start:stop]
        begin += len(ids)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_first_packed_step_equals_its_documents(tiny_folder, strategy, tmp_path):
    flags = {"packing": True, "packing_strategy": strategy, "max_length": CAPACITY, **ASSISTANT}
    documents = list(pieces(tokenize(tiny_folder), strategy))
    cut = {"bfd": 0, "bfd_split": 1, "wrapped": 10}[strategy]
    assert len(documents) >= len(MESSAGES) + cut and max(len(ids) for ids, _ in documents) <= CAPACITY
    ours = our_log(tiny_folder, MESSAGES, tmp_path / "ours", **flags)
    assert ours["epoch"] == 1  # all rows in one step
    expected = by_document(tiny_folder, documents)
    assert_same(ours, expected, expected.keys() - {"loss"})
    # TRL's documents see each other where it wraps them.
    if strategy != "wrapped":
        assert_same(ours, trl_log(tiny_folder, MESSAGES, tmp_path / "theirs", **flags))


def test_first_step_of_a_template_without_marks_equals_its_documents(tiny_folder, tmp_path):
    """TRL knows the marked templates of some models, and refuses others."""
    template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert template != CHATML
    (tmp_path / "plain.jinja").write_text(template)
    # From where generation would start to where the next message does, newline included.
    marked = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    flags = {"max_length": None, "chat_template_path": tmp_path / "plain.jinja", **ASSISTANT}
    ours = our_log(tiny_folder, MESSAGES, tmp_path / "ours", **flags)
    expected = by_document(tiny_folder, tokenize(tiny_folder, marked))
    assert_same(ours, expected, expected.keys() - {"loss"})
