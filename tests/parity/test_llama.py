"""The decoder against transformers' Llama, in float32: logits, gradients, and the exported folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpost import from_pretrained, save_pretrained
from jaxpost.models.families import rows_of
from jaxpost.objectives.sft import SFT
from tests.conftest import TINY_LLAMA, make_batch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

CONFIGS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "odd_shapes": {
        "hidden_size": 42,
        "head_dim": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 301,
    },
    "multi_query": {"num_key_value_heads": 1, "rope_theta": 500000.0},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """A random transformers model and ours, read from its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {**TINY_LLAMA, **CONFIGS[request.param], "initializer_range": 0.2}
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    theirs.save_pretrained(tmp_path / "hf")
    return theirs, from_pretrained(tmp_path / "hf")


def torch_inputs(batch):
    # HF has no segments: real tokens see only real tokens before them, as with right padding here.
    return {"input_ids": torch.tensor(batch["tokens"]).long(), "attention_mask": torch.tensor(batch["segments"]).long()}


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_logits(pair):
    theirs, ours = pair
    batch = make_batch(rows=3, length=48, vocab_size=300)
    real = batch["segments"] > 0
    with torch.no_grad():
        expected = theirs(**torch_inputs(batch)).logits.numpy()
    logits = np.asarray(ours(batch["tokens"], batch["positions"], batch["segments"]))
    assert relative(logits[real], expected[real]) < 1e-4


def test_gradients(pair):
    theirs, ours = pair
    batch = make_batch(rows=3, length=48, vocab_size=300)
    labels = torch.tensor(np.where(batch["loss_mask"] > 0, batch["tokens"], -100)).long()
    theirs(**torch_inputs(batch), labels=labels).loss.backward()

    def mean_loss(model):
        loss, _ = SFT().loss(model, jax.tree.map(jnp.asarray, batch))
        return loss.value()

    gradient = dict(nnx.to_flat_state(nnx.state(nnx.grad(mean_loss)(ours))))
    by_name = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    for row in rows_of(ours.config):
        mine = np.asarray(gradient[tuple(row.path.split("."))][...])
        for layer in range(ours.config.num_layers) if "{}" in row.hf_name else [None]:
            one = mine if layer is None else mine[layer]
            assert relative(one.T if row.transpose else one, by_name[row.hf_name.format(layer)]) < 1e-3, row.path


def test_export_reloads_with_every_tensor_equal(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs, ours = pair
    save_pretrained(ours, None, tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
