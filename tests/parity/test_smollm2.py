"""The real SmolLM2-135M-Instruct, where tools/quickstart.sh has left it, against transformers' own GGUF path."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpost import from_pretrained, save_pretrained
from jaxpost.compilation import as_written
from jaxpost.data.word_problems import generate as word_problems
from jaxpost.models.checkpoint import open_checkpoint
from jaxpost.models.config import Compute
from jaxpost.objectives.logps import score_batch
from jaxpost.rl.generate import generate
from jaxpost.rl.rewards import Scored
from jaxpost.rl.rows import Answers, rows_of
from jaxpost.rl.sampling import Sampling

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
GGUF = CACHE / "jaxpost" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(not GGUF.exists(), reason="run tools/quickstart.sh first")
def test_logits_and_export(tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    ours, tokenizer = from_pretrained(GGUF), open_checkpoint(GGUF).tokenizer()
    text = "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\nWilliam Shakespeare, around 1600."
    ids = tokenizer(text)["input_ids"]
    tokens = np.array([ids + np.random.default_rng(0).integers(0, 49152, 300 - len(ids)).tolist()])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(ours, tokens))
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f"relative error of the logits: {error:.1e}")
    assert error < 1e-3
    save_pretrained(ours, tokenizer, tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.skipif(not GGUF.exists(), reason="run tools/quickstart.sh first")
def test_greedy_completions():
    """32 prompts of mixed lengths in one batch; a token may differ where the two best are within 1e-3."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    ours, tokenizer = from_pretrained(GGUF), open_checkpoint(GGUF).tokenizer()
    prompts = []
    for number, row in enumerate(word_problems(32)):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        prompts.append(ids if number % 2 else ids[: 6 + number])
    longest = max(map(len, prompts))
    room = [longest - len(ids) for ids in prompts]
    tokens = torch.tensor([[0] * left + ids for left, ids in zip(room, prompts, strict=True)])
    mask = torch.tensor([[0] * left + [1] * len(ids) for left, ids in zip(room, prompts, strict=True)])
    options = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    expected = theirs.generate(tokens, attention_mask=mask, **options)[:, longest:].tolist()
    completions = generate(
        ours,
        [np.array(ids) for ids in prompts],
        max_new_tokens=64,
        eos_ids=[tokenizer.eos_token_id],
        sampling=Sampling(temperature=0.0),
        batch_size=32,
    )
    forward, same = jax.jit(lambda model, tokens: model(tokens)), 0
    for prompt, completion, reply in zip(prompts, completions, expected, strict=True):
        drawn = completion.tokens
        if drawn == reply[: len(drawn)]:
            same += 1
            continue
        place = next(i for i, (a, b) in enumerate(zip(drawn, reply, strict=False)) if a != b)
        text = np.array([[*prompt, *drawn[:place]] + [0] * (longest + 64 - len(prompt) - place)])
        logits = np.sort(np.asarray(forward(ours, text))[0, len(prompt) + place - 1])
        assert logits[-1] - logits[-2] < 1e-3, (prompt, place)
    print(f"{same} of 32 completions of up to 64 tokens are the same")
    assert same > 24


@pytest.mark.skipif(not GGUF.exists(), reason="run tools/quickstart.sh first")
@pytest.mark.parametrize(("dtype", "mean", "most"), [("float32", 1e-6, 1e-5), ("bfloat16", 1e-2, np.inf)])
def test_training_and_sampling_say_the_same_of_a_token(dtype, mean, most):
    """8 completions each of 8 problems, a problem in a row, which is read alone."""
    model, tokenizer = from_pretrained(GGUF), open_checkpoint(GGUF).tokenizer()
    model.compute = Compute(dtype=dtype, branches=True)
    chats = [row["prompt"] for row in word_problems(20)[:8]]
    prompts = [
        np.array(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats
    ]
    count, ends = 8 * len(prompts), [tokenizer.eos_token_id]
    options = {"max_new_tokens": 24, "eos_ids": ends, "num_return_sequences": 8, "batch_size": count}
    completions = generate(model, prompts, **options)
    scored = Scored(np.zeros((count, 1), np.float32), np.zeros((count, 1), bool), {}, {}, [""])
    numbers = np.arange(count)
    answers = Answers((numbers // 8).tolist(), [prompts[i // 8] for i in numbers], completions, [None] * count, scored)
    rows = rows_of(answers, numbers.reshape(-1, 8).tolist(), [True] * count, group_size=8, branches=True)
    score = jax.jit(lambda model, batch: score_batch(model, batch)[:2], compiler_options=as_written())
    differences = []
    for row in range(len(prompts)):
        batch = {name: rows[name][row : row + 1] for name in ("tokens", "positions", "segments", "loss_mask")}
        scores, mask = score(model, batch)
        differences.append(np.abs(np.asarray(scores.logps) - rows["sampled_logps"][row])[np.asarray(mask)])
    difference = np.concatenate(differences)
    print(f"{dtype}: rows of {rows['tokens'].shape}, mean {difference.mean():.1e}, at most {difference.max():.1e}")
    assert len(difference) == sum(len(completion.tokens) for completion in completions)
    assert difference.mean() < mean and difference.max() < most
