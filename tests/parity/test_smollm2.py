"""The real SmolLM2-135M-Instruct, where tools/quickstart.sh has left it, against transformers' own GGUF path."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpost import from_pretrained, save_pretrained
from jaxpost.models.checkpoint import open_checkpoint

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
