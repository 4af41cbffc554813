"""GGUF files against transformers: against its own GGUF loader, and models of its written as llama.cpp writes them."""

import numpy as np
import pytest

from jaxpost import from_pretrained
from jaxpost.models.gguf import GGUFCheckpoint
from jaxpost.models.gguf_architectures import ARCHITECTURES
from jaxpost.models.gguf_file import dequantize, open_gguf
from tests.models.gguf_files import (
    SIZES,
    Blocks,
    Q,
    gguf_tensors,
    llama3_factors,
    model_keys,
    sentencepiece_keys,
    write_gguf,
    write_model,
)
from tests.models.test_gguf import CONFIGS
from tests.models.test_gguf_quants import MEANING, random_blocks
from tests.models.test_gguf_tokenizer import GEMMA_TEXTS, TEXTS

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from transformers.integrations.gguf.dequant import GGML_BLOCK  # noqa: E402
from transformers.integrations.gguf.dequant import dequantize as torch_dequantize  # noqa: E402

pytestmark = pytest.mark.parity

UNLISTED = "gemma"  # transformers' loader does not know it
# What its loader does not read, or what says nothing about the model; it keeps all digits of a float32.
UNREAD = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "unk_token_id", "rms_norm_eps"),
    *("_sliding_window_pattern", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rope_parameters", "head_dim"),
}


@pytest.mark.parametrize(
    ("arch", "kind", "tied"),
    [
        *(("llama", kind, True) for kind in (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1)),
        *((arch, Q.Q8_0, True) for arch in ARCHITECTURES if arch not in ("llama", UNLISTED)),
        *((arch, Q.F32, False) for arch in ("llama", "qwen2", "qwen3", "gemma3")),
    ],
)
def test_every_tensor_has_the_bits_that_transformers_loads(tmp_path, arch, kind, tied):
    checkpoint = GGUFCheckpoint(write_model(tmp_path / "m.gguf", arch=arch, kind=kind, tied=tied))
    config = transformers.AutoConfig.for_model(**checkpoint.config)  # theirs leaves out the heads' dimension
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32
    )
    theirs = {name: weights.numpy() for name, weights in model.state_dict().items()}
    if tied:
        theirs.pop("lm_head.weight")
    assert checkpoint.names() == theirs.keys()
    for name, weights in theirs.items():
        read = checkpoint.read(name)
        assert read.dtype == weights.dtype and read.shape == weights.shape == checkpoint.shape(name)
        assert read.tobytes() == weights.tobytes(), name


def source_config(arch):
    """The config of the model that `model_keys` describes, as transformers understands it."""
    sizes, fields = SIZES[arch], CONFIGS[arch]
    return transformers.AutoConfig.for_model(
        hidden_size=sizes.embed,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **fields,
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_written_as_gguf_has_the_logits_of_the_model(tmp_path, arch):
    config = source_config(arch)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 1.0 if name.endswith("norm.weight") and not arch.startswith("gemma") else 0.0
        torch.nn.init.normal_(parameter, scale, 0.2)
    tensors = {name: weights.numpy() for name, weights in model.state_dict().items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "m.gguf", model_keys(arch), gguf_tensors(tensors, arch), arch=arch)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    ours = np.asarray(from_pretrained(path)(tokens))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != UNLISTED])
def test_the_config_describes_the_same_model(tmp_path, arch):
    path = write_model(tmp_path / "m.gguf", arch=arch)
    ours = transformers.AutoConfig.for_model(**GGUFCheckpoint(path).config)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert type(ours) is type(theirs)
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-7)
    unread = UNREAD - {"head_dim", "rope_parameters"} if arch == "llama" else UNREAD
    pairs = {key: (value, theirs.to_dict().get(key)) for key, value in ours.to_dict().items() if key not in unread}
    assert {key: pair for key, pair in pairs.items() if pair[0] != pair[1]} == {}


def test_llama3_scaling_gives_the_frequencies_of_the_file(tmp_path):
    factors = llama3_factors(50000.0, 32.0)
    config = GGUFCheckpoint(write_model(tmp_path / "m.gguf", {}, {"rope_freqs.weight": factors})).config
    plain = {key: value for key, value in config.items() if key != "rope_scaling"}
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    scaled, unscaled = (rotary(transformers.LlamaConfig(**fields)).inv_freq for fields in (config, plain))
    torch.testing.assert_close(unscaled / torch.tensor(factors), scaled)


@pytest.mark.parametrize("kind", [kind for kind in MEANING if kind in GGML_BLOCK], ids=lambda kind: kind.name)
def test_any_codes_have_the_meaning_that_transformers_kernels_give_them(tmp_path, kind):
    data = random_blocks(kind, (6, 512))
    _, tensors = open_gguf(write_gguf(tmp_path / "m.gguf", {}, {"t": Blocks(kind, data)}))
    theirs = torch_dequantize(torch.tensor(data), int(kind)).numpy().reshape(6, 512)
    np.testing.assert_allclose(dequantize(tensors["t"]), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "changes", "tokenizer", "texts"),
    [
        ("llama", {"tokenizer.ggml.pre": "gpt-2"}, None, TEXTS),
        ("qwen2", {"tokenizer.ggml.pre": "qwen2"}, None, TEXTS),
        ("qwen3", {"tokenizer.ggml.pre": "qwen2"}, None, TEXTS),
        # For Llama's they add no space before a text that starts with one; llama.cpp and we do.
        ("llama", {}, sentencepiece_keys(), [text for text in TEXTS if not text.startswith(" ")]),
        ("gemma2", {}, None, GEMMA_TEXTS),
        ("gemma3", {}, None, GEMMA_TEXTS),
    ],
)
def test_text_has_the_ids_that_transformers_gives(tmp_path, arch, changes, tokenizer, texts):
    ours = GGUFCheckpoint(write_model(tmp_path / "m.gguf", changes, arch=arch, tokenizer=tokenizer)).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
