"""Reward models against transformers' sequence classifiers with one label: scores, and the exported folder."""

import copy
import warnings

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxpost import from_pretrained, save_pretrained
from tests.parity.family_configs import CONFIGS
from tests.parity.test_families import complaints

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

NAMES = ["llama-tied", "gemma2-caps", "qwen3_moe-plain"]
LENGTHS = [11, 17, 4, 9]


@pytest.fixture(params=NAMES)
def pair(request, tmp_path):
    """A random classifier with one label, its folder, and ours, read from there."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(**copy.deepcopy(CONFIGS[request.param]), num_labels=1)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = AutoModelForSequenceClassification.from_config(config, **options).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    theirs.save_pretrained(tmp_path / "hf")
    return theirs, from_pretrained(tmp_path / "hf", head="reward"), tmp_path / "hf"


def test_scores_at_the_last_token(pair):
    theirs, ours, _ = pair
    tokens = np.random.default_rng(0).integers(3, 301, (len(LENGTHS), max(LENGTHS)))
    real = np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None]
    tokens = np.where(real, tokens, theirs.config.pad_token_id)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), attention_mask=torch.tensor(real).long()).logits[:, 0].numpy()
    scores = np.asarray(ours(tokens, segments=real.astype(np.int32)))
    last = scores[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1]
    assert np.abs(last - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.ptp(expected) > 0.1 * np.abs(expected).max()  # rows do differ


def test_export_is_exact_and_loads_without_a_warning(pair, tmp_path):
    from transformers import AutoModelForSequenceClassification

    theirs, ours, folder = pair
    save_pretrained(ours, None, tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    with complaints() as heard, warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not heard and not any(info.values()), (heard, info)
    assert type(again) is type(theirs) and again.config.num_labels == 1
    assert again.config.pad_token_id == theirs.config.pad_token_id
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    again.save_pretrained(tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_a_new_head_on_a_language_model_is_a_classifier(pair, tmp_path, caplog):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    theirs, _, _ = pair
    config = copy.deepcopy(theirs.config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    with caplog.at_level("INFO", "jaxpost"):
        ours = from_pretrained(tmp_path / "lm", head="reward")
    assert "its reward head is new" in caplog.text
    save_pretrained(ours, None, tmp_path / "out")
    with complaints() as heard:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert not heard
    score = nnx.to_pure_dict(nnx.state(ours))["head"]["kernel"]
    np.testing.assert_array_equal(loaded.score.weight.detach().numpy().T, score)
    assert abs(loaded.score.weight.std().item() / config.initializer_range - 1) < 0.5
