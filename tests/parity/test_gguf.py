"""GGUF files against transformers' own GGUF loader."""

import pytest
from gguf import GGMLQuantizationType as Q

from jaxpost.models.gguf import GGUFCheckpoint
from tests.models.test_gguf import llama3_factors, sentencepiece_keys, write_llama
from tests.models.test_gguf_tokenizer import TEXTS

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda kind: kind.name)
def test_every_tensor_has_the_bits_that_transformers_loads(tmp_path, kind, tied):
    path = write_llama(tmp_path / "m.gguf", kind=kind, tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    theirs = {name: weights.numpy() for name, weights in model.state_dict().items()}
    if tied:
        theirs.pop("lm_head.weight")
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.names() == theirs.keys()
    for name, weights in theirs.items():
        read = checkpoint.read(name)
        assert read.dtype == weights.dtype and read.shape == weights.shape == checkpoint.shape(name)
        assert read.tobytes() == weights.tobytes(), name


def test_the_config_describes_the_same_model(tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    ours = transformers.LlamaConfig(**GGUFCheckpoint(path).config)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-7)  # they keep the digits of the float32
    told = "name_or_path", "architectures", "rms_norm_eps", "transformers_version", "dtype", "unk_token_id"
    differing = {
        key: (value, theirs.to_dict().get(key)) for key, value in ours.to_dict().items() if not key.endswith(told)
    }
    assert {key: pair for key, pair in differing.items() if pair[0] != pair[1]} == {}


def test_llama3_scaling_gives_the_frequencies_of_the_file(tmp_path):
    factors = llama3_factors(50000.0, 32.0)
    config = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", {}, {"rope_freqs.weight": factors})).config
    plain = {key: value for key, value in config.items() if key != "rope_scaling"}
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    scaled, unscaled = (rotary(transformers.LlamaConfig(**fields)).inv_freq for fields in (config, plain))
    torch.testing.assert_close(unscaled / torch.tensor(factors), scaled)


@pytest.mark.parametrize(
    ("changes", "tokenizer"),
    [({"tokenizer.ggml.pre": "gpt-2"}, None), ({"tokenizer.ggml.pre": "qwen2"}, None), ({}, sentencepiece_keys())],
    ids=["gpt-2", "qwen2", "llama"],
)
def test_text_has_the_ids_that_transformers_gives(tmp_path, changes, tokenizer):
    ours = GGUFCheckpoint(write_llama(tmp_path / "m.gguf", changes, tokenizer=tokenizer)).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    # For SentencePiece they add no space before a text that starts with one; llama.cpp and we do.
    for text in TEXTS if tokenizer is None else [text for text in TEXTS if not text.startswith(" ")]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
