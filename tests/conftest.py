"""Eight fake devices, a compile cache, and one tiny model and tokenizer for every test."""

import itertools
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# A device that waits in several collectives at once takes a thread for each, and eight of them can wait for ever: in
# program order there is one at a time, and with NPROC there are threads to spare.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling tiny programs takes longer than running them
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
from flax import nnx

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

MAX_MAPPINGS = 20_000  # of memory; Linux lets a process have 65,530, and every compiled program is some
_TESTS = itertools.count(1)

TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """A byte-level tokenizer with ChatML's special tokens: 259 ids, no network."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHATML,
    )


def make_model(head="lm", **changes):
    """A random tiny Llama; `changes` are fields of its config.json."""
    from jaxpost.models.families import read_config
    from jaxpost.models.transformer import Decoder

    return Decoder(read_config({**TINY_LLAMA, **changes}, "tiny"), head=head, rngs=nnx.Rngs(0))


def make_noisy_model(seed, **changes):
    """`make_model` with larger weights that depend on the seed, so that two of them differ in what they say."""
    model, rng = make_model(**changes), np.random.default_rng(seed)

    def noisy(weight):
        return (weight + 0.05 * (weight.ndim > 1) * rng.normal(size=weight.shape)).astype(weight.dtype)

    nnx.update(model, jax.tree.map(noisy, nnx.to_pure_dict(nnx.state(model))))
    return model


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="tests of faults: as many of each as the README states")


@pytest.fixture(autouse=True)
def few_programs():
    """Forget what has been compiled before the process has more mappings than it may and is aborted."""
    yield
    maps = Path("/proc/self/maps")
    if next(_TESTS) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder with the tiny model and tokenizer."""
    from jaxpost import save_pretrained

    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_pretrained(make_model(), make_tokenizer(), folder, generation_config={"eos_token_id": 1})
    return folder


def make_batch(rows=8, length=24, vocab_size=320, seed=0):
    """Ragged right-padded rows with a random loss mask."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 3, length + 1, rows)
    real = np.arange(length) < lengths[:, None]
    return {
        "tokens": np.where(real, rng.integers(3, vocab_size, (rows, length)), 0).astype(np.int32),
        "positions": np.broadcast_to(np.arange(length), (rows, length)).astype(np.int32),
        "segments": real.astype(np.int32),
        "loss_mask": (real & (rng.random((rows, length)) < 0.7) & (np.arange(length) > 0)).astype(np.float32),
    }
