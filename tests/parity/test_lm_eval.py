"""What lm-evaluation-harness is told by jaxpost against what its own HFLM says of the same model."""

import numpy as np
import pytest

from jaxpost import save_pretrained
from jaxpost.lm_eval import JaxpostLM
from tests.conftest import make_noisy_model, make_tokenizer
from tests.e2e.test_lm_eval import PAIRS, Request

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("both") / "model"
    save_pretrained(make_noisy_model(4), make_tokenizer(), folder, generation_config={"eos_token_id": 1})
    return JaxpostLM(str(folder), batch_size=2), HFLM(str(folder), device="cpu", dtype="float32", batch_size=2)


def test_log_likelihoods(both):
    ours, theirs = (model.loglikelihood([Request(pair) for pair in PAIRS]) for model in both)
    np.testing.assert_allclose([logp for logp, _ in ours], [logp for logp, _ in theirs], rtol=1e-5)
    assert [greedy for _, greedy in ours] == [bool(greedy) for _, greedy in theirs]


def test_rolling_log_likelihoods(both):
    # HFLM takes windows that begin alike for one another, as those of a text that repeats itself do.
    letters = np.random.default_rng(0).choice(list("abcdefgh "), 800)
    texts = [Request(("".join(letters),)), Request(("short",))]
    ours, theirs = (model.loglikelihood_rolling(texts) for model in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_completions(both):
    kwargs = {"until": ["\n", "e"], "max_gen_toks": 16, "do_sample": False}
    asked = [Request((context, kwargs)) for context in ("one", "a longer context", "x" * 300)]
    ours, theirs = (model.generate_until(asked) for model in both)
    assert ours == theirs
