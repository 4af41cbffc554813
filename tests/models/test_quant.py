"""Kernels in few bits: what is stored, what a model makes of it, and that no dense copy of all of it is ever there."""

import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.errors import ConfigError
from jaxpost.models import hf
from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.quant import SCHEMES, Frozen, QuantConfig, Quantized, dense, dequantize, for_schemes, quantize
from jaxpost.models.resize import resize_embeddings
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.sft import SFT
from jaxpost.sharding import make_mesh, parameter_spec, put
from jaxpost.train.state import create_state
from jaxpost.train.step import make_step
from tests.conftest import TINY_LLAMA, make_batch, make_model

NO_BIASES = {name: value for name, value in TINY_LLAMA.items() if not name.endswith("_bias")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MOE = {**NO_BIASES, "model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 64}
FAMILIES = {"llama": TINY_LLAMA, "phi3": {**NO_BIASES, "model_type": "phi3"}, "moe": MOE}
UP = "model.layers.1.mlp.up_proj.weight"


def make(fields, scheme=None, **compute):
    config = read_config({**fields, "head_dim": fields["hidden_size"] // fields["num_attention_heads"]}, "tiny")
    model = Decoder(config, compute=Compute(**compute), rngs=nnx.Rngs(0))
    return model if scheme is None else quantize(model, scheme)


def tokens_of(rows=2, length=8):
    return jnp.asarray(np.random.default_rng(0).integers(0, 320, (rows, length)))


def assert_equal(one, other):
    one, other = (dict(jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(m)))) for m in (one, other))
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype
        np.testing.assert_array_equal(value, other[path], err_msg=str(path))


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def paths(model, kind=nnx.Variable):
    return {".".join(map(str, path)) for path in dict(nnx.to_flat_state(nnx.state(model, kind)))}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_kernels_of_blocks_are_stored_in_few_bits_and_none_is_trainable(family, scheme):
    plain, model = (nnx.eval_shape(lambda scheme=scheme: make(FAMILIES[family], scheme)) for scheme in (None, scheme))
    kernels = paths(plain) - paths(model)
    assert kernels == {path for path in paths(plain) if for_schemes(path)}
    assert {path.split(".")[-2] for path in kernels} == {"query", "key", "value", "out", "gate", "up", "down"}
    assert paths(model, nnx.Param) == paths(plain) - kernels
    assert {path.rpartition(".")[0] for path in paths(model, Frozen)} == kernels
    part = "integers" if scheme == "int8" else "codes"
    assert f"layers.attention.query.kernel.{part}" in paths(model, Frozen)
    for name in ("query", "key", "value", "out"):
        kernel, quantised = (vars(decoder.layers.attention)[name].kernel for decoder in (plain, model))
        assert isinstance(quantised, Quantized) and quantised.shape == kernel.shape


@pytest.mark.parametrize(("family", "scheme"), [("llama", "nf4"), ("llama", "int8"), ("moe", "nf4_plain")])
def test_a_quantised_model_is_the_dense_model_with_rounded_kernels(family, scheme):
    model, rounded = make(FAMILIES[family], scheme), dequantize(make(FAMILIES[family], scheme), "float32")
    assert not any(isinstance(module, Quantized) for _, module in nnx.iter_modules(rounded))
    assert_equal(quantize(nnx.clone(model), "int8"), model)
    tokens, forward = tokens_of(), jax.jit(lambda model, tokens: model(tokens))
    expected = forward(rounded, tokens)
    np.testing.assert_allclose(forward(model, tokens), expected, atol=1e-5)
    prefill, decode = (
        jax.jit(name, static_argnums=argument) for name, argument in ((Decoder.prefill, 3), (Decoder.decode, ()))
    )
    h, cache = prefill(model, tokens[:, :5], jnp.array([5, 5]), 8)
    for step in range(5, 8):
        np.testing.assert_allclose(model.unembed(h), expected[:, step - 1], atol=1e-5)
        h, cache = decode(model, tokens[:, step], cache)


@pytest.mark.parametrize(("family", "remat"), [("llama", "none"), ("llama", "dots"), ("moe", "none"), ("moe", "full")])
def test_gradients_are_those_of_the_rounded_kernels(family, remat):
    def gradient(model):
        graphdef, params, frozen = nnx.split(model, nnx.filterlib.Any(nnx.PathContains("embed")), ...)
        tokens = tokens_of()
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params, frozen)(tokens)))))(params)

    mine = gradient(make(FAMILIES[family], "nf4", remat=remat))
    expected = gradient(dequantize(make(FAMILIES[family], "nf4", remat=remat), "float32"))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(b) > 0 and np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def abstract(fields, scheme, **compute):
    """Graph and arrays' shapes of a quantised model, none of which is made."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(fields, scheme, **compute)))
    return graphdef, nnx.to_pure_dict(state)


@pytest.mark.parametrize(("family", "remat"), [("llama", "none"), ("llama", "dots"), ("moe", "none"), ("moe", "full")])
def test_the_backward_pass_keeps_no_dense_kernels(family, remat):
    """Temporaries of a gradient by small arrays in every layer stay far below the dense kernels of all layers."""
    wide = {**FAMILIES[family], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16}
    wide |= {"moe_intermediate_size": 128} if family == "moe" else {}
    graphdef, weights = abstract(wide, "nf4", remat=remat)
    _, whole = abstract(wide, None)

    def loss(shift, weights, tokens):
        model = nnx.merge(graphdef, weights)
        model.layers.attention_norm.scale[...] += shift
        return jnp.sum(jnp.sin(model.hidden(tokens, jnp.zeros_like(tokens), jnp.ones_like(tokens))[0]))

    shift, tokens = jax.ShapeDtypeStruct((16, 256), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(shift, weights, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < nbytes(whole["layers"]) / 4
    assert memory.argument_size_in_bytes < nbytes(whole["layers"]) / 4


def test_a_step_trains_the_rest_and_leaves_the_parts_alone():
    mesh = make_mesh("fsdp=4,tensor=2")
    model = hf.place(make(TINY_LLAMA, "nf4", remat="dots"), Compute(remat="dots"), mesh)
    before = jax.device_get(nnx.to_pure_dict(nnx.state(model, Frozen)))
    optimizer = optax.adamw(1e-2)
    with jax.set_mesh(mesh):
        graphdef, state = create_state(model, optimizer, nnx.Param, mesh)
        step = make_step(SFT(), graphdef, state, optimizer, lambda _: 1e-2, max_grad_norm=1.0, num_micro_batches=2)
        losses = []
        for _ in range(4):
            state, report = step(state, put(make_batch(rows=16), mesh))
            losses.append(float(report.metrics["loss"].total / report.metrics["loss"].count))
    assert losses[-1] < losses[0] - 0.05
    assert "kernel" not in str(jax.tree_util.tree_structure(state.params))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_are_split_as_their_kernel_is():
    mesh = make_mesh("fsdp=4,tensor=2")

    def spec(path, *shape):
        return tuple(parameter_spec(f"layers.{path}", shape, mesh))

    assert spec("mlp.up.kernel.codes", 2, 64, 32, 512) == (None, "fsdp", None, "tensor")
    assert spec("mlp.up.kernel.absmax", 2, 64, 512) == (None, "fsdp", "tensor")
    assert spec("mlp.up.kernel.absmax_low", 2, 64, 2) == (None, "fsdp", "tensor")
    assert spec("mlp.up.kernel.absmax_step", 2, 64, 1) == (None, "fsdp", None)
    assert spec("attention.out.kernel.integers", 2, 64, 32) == (None, "tensor", "fsdp")
    assert spec("attention.out.kernel.scale", 2, 32) == (None, "fsdp")
    assert spec("mlp.experts.down.kernel.codes", 2, 4, 64, 32, 512) == (None, None, "tensor", None, "fsdp")
    assert spec("mlp.experts.down.kernel.scale", 2, 4, 512) == (None, None, "fsdp")
    assert spec("mlp.up.kernel.codes", 2, 9, 32, 511) == (None, None, None, None)
    with pytest.raises(ConfigError, match=r"layers\.mystery\.kernel\.codes has no row"):
        parameter_spec("layers.mystery.kernel.codes", (2, 64, 32, 512), mesh)


@pytest.fixture
def wide_folder(tmp_path):
    """Kernels of several blocks and groups: [512, 320], [320, 512], [512, 1024]; attention has 320 outputs."""
    fields = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 5, "num_key_value_heads": 5}
    save_pretrained(make_model(**fields, head_dim=64), None, tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [("nf4", None), ("nf4", "fsdp=4,tensor=2"), ("nf4", "data=2,tensor=4"), ("int8", "fsdp=4,tensor=2")],
)
def test_loading_is_quantising_what_was_loaded_on_any_mesh(wide_folder, scheme, mesh):
    expected = quantize(from_pretrained(wide_folder, dtype="bfloat16"), scheme)
    model = from_pretrained(wide_folder, dtype="bfloat16", quantization=scheme, mesh=mesh and make_mesh(mesh))
    assert_equal(model, expected)
    name = "integers" if scheme == "int8" else "codes"
    codes = vars(model.layers.mlp.up.kernel)[name][...]
    assert codes.addressable_shards[0].data.size * (1 if mesh is None else 8 if "fsdp" in mesh else 4) == codes.size
    tokens = tokens_of()
    forward = jax.jit(lambda model, tokens: model(tokens))
    with jax.set_mesh(codes.sharding.mesh):
        logits = np.asarray(forward(model, tokens))
    expected = np.asarray(forward(expected, tokens))
    assert np.linalg.norm(logits - expected) <= 0.01 * np.linalg.norm(expected)  # bfloat16


def shards_of(model):
    """Of the arrays of this process: what each of its devices holds, as a number."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {
        f"{jax.tree_util.keystr(path)} {shard.index}": zlib.crc32(np.asarray(shard.data).tobytes())
        for path, leaf in leaves
        for shard in leaf.addressable_shards
    }


PROCESS = """
import json, sys, zlib
import jax
import numpy as np
from flax import nnx
address, rank, source = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
from jaxpost import from_pretrained
from jaxpost.sharding import make_mesh
model = from_pretrained(source, quantization="nf4", mesh=make_mesh("fsdp=4,tensor=2"))
"""


def test_two_processes_hold_what_one_does(wide_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    code = f"{PROCESS}\n{inspect.getsource(shards_of)}\nprint(json.dumps(shards_of(model)))"
    commands = [[sys.executable, "-c", code, address, str(rank), str(wide_folder)] for rank in (0, 1)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
    held = [json.loads(process.communicate(timeout=200)[0].splitlines()[-1]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    whole = shards_of(from_pretrained(wide_folder, quantization="nf4", mesh=make_mesh("fsdp=4,tensor=2")))
    assert held[0] | held[1] == whole and held[0] != whole


@pytest.mark.parametrize("family", ["phi3", "moe"])
def test_kernels_that_are_parts_of_tensors_or_one_an_expert(tmp_path, family):
    save_pretrained(make(FAMILIES[family]), None, tmp_path / "model")
    expected = quantize(from_pretrained(tmp_path / "model"), "nf4")
    assert_equal(from_pretrained(tmp_path / "model", quantization="nf4", mesh=make_mesh("fsdp=8")), expected)


def test_few_dense_kernels_are_alive_at_a_time(tmp_path, monkeypatch):
    save_pretrained(make_model(num_hidden_layers=24), None, tmp_path / "deep")
    made, counts, assemble = [], [], hf._assemble

    def watched(*args):
        kernel = assemble(*args)
        if kernel.shape not in ((320, 32), (24, 32), (32,)):  # embedding and norms
            made.append(weakref.ref(kernel))
            counts.append(sum(reference() is not None for reference in made))
        return kernel

    monkeypatch.setattr(hf, "_assemble", watched)
    from_pretrained(tmp_path / "deep", quantization="nf4")
    assert len(counts) == 24 * 7 and max(counts) <= hf.READERS + 1


@pytest.mark.parametrize(
    ("bad", "mesh", "scheme"), [(np.nan, None, "nf4"), (np.inf, "fsdp=8", "nf4"), (np.nan, "fsdp=8", "int8")]
)
def test_weights_that_are_not_finite_are_refused_by_name(tiny_folder, tmp_path, bad, mesh, scheme):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP] = tensors[UP].copy()
    tensors[UP][-1, -1] = bad
    tensors["model.norm.weight"] = np.full(32, bad, np.float32)
    save_file(tensors, folder / "model.safetensors")
    mesh = mesh and make_mesh(mesh)
    with pytest.raises(ConfigError) as caught:
        from_pretrained(folder, mesh=mesh, quantization=scheme)
    assert f"NaN or infinity (in float32) in {UP}, model.norm.weight; " in str(caught.value)
    model = from_pretrained(folder, quantization=scheme, allow_nonfinite=True)
    assert not np.isfinite(dense(model.layers.mlp.up.kernel, jnp.float32)[1]).all()


def test_a_quantised_model_is_saved_once_it_is_dense(tiny_folder, tmp_path):
    model = from_pretrained(tiny_folder, quantization="nf4")
    with pytest.raises(ConfigError, match=r"layers\..*kernel is stored as nf4: this is a base of adapters"):
        save_pretrained(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expected = model(tokens_of())
    save_pretrained(dequantize(model, "float32"), None, tmp_path / "out")
    np.testing.assert_allclose(from_pretrained(tmp_path / "out")(tokens_of()), expected, atol=1e-6)


def test_a_quantised_model_takes_new_tokens(tiny_folder):
    model = resize_embeddings(from_pretrained(tiny_folder, quantization="int8", mesh=make_mesh("fsdp=8")), 328)
    assert model(tokens_of()).shape == (2, 8, 328)


def test_options_have_trl_s_names_and_say_what_they_take(tiny_folder):
    assert QuantConfig().quantization() is None
    assert QuantConfig(load_in_4bit=True).quantization() == "nf4"
    assert QuantConfig(load_in_4bit=True, use_bnb_nested_quant=False).quantization() == "nf4_plain"
    assert QuantConfig(load_in_8bit=True).quantization() == "int8"
    for flags, message in (
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude each other"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'.*takes one of: nf4"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantConfig(**flags)
    with pytest.raises(ConfigError, match=r"quantization is 'fp4'.*nf4, nf4_plain, int8"):
        from_pretrained(tiny_folder, quantization="fp4")


LLAMA_8B = {
    **TINY_LLAMA,
    **{"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
}


def test_llama_8b_takes_less_than_6_gb():
    graphdef, weights = abstract(LLAMA_8B, "nf4", dtype="bfloat16")
    for part in (weights["embed"], weights["head"]):
        for name, leaf in part.items():
            part[name] = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    assert nbytes(weights) < 5.71e9
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    forward = jax.jit(lambda weights, tokens: nnx.merge(graphdef, weights)(tokens)).lower(weights, tokens)
    assert forward.compile().memory_analysis().argument_size_in_bytes < 5.71e9
