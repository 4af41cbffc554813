"""What 8-bit and bfloat16 moments keep of Adam, and what they cost."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.sharding import make_mesh, path_of, shardings
from jaxpost.train import moments
from jaxpost.train.moments import BLOCK, adam_8bit, adam_bf16

ADAM = optax.scale_by_adam()
encode = jax.jit(moments.encode, static_argnums=3)
decode, block_scales = jax.jit(moments.decode), jax.jit(moments.block_scales)
SIZES = {jnp.int8: 127, jnp.uint8: 254}


def paper_map(signed):
    """Positive values of the dynamic map (Dettmers et al., 2021, section 1.3; bitsandbytes' create_dynamic_map)."""
    values = []
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        values.extend(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    return np.sort(values)


@pytest.mark.parametrize("dtype", SIZES)
def test_codes_are_the_papers_map_with_its_largest_value_at_one(dtype):
    codes = jnp.arange(SIZES[dtype] + 1).astype(dtype)
    values = decode(codes, jnp.ones(1))
    expected = paper_map(signed=dtype == jnp.int8)
    np.testing.assert_allclose(values, [0, *expected / expected[-1]], rtol=1e-6)
    assert values[-1] == 1
    if dtype == jnp.int8:
        np.testing.assert_array_equal(decode(-codes, jnp.ones(1)), -values)


@pytest.mark.parametrize("dtype", SIZES)
def test_encode_takes_the_nearest_value(dtype):
    values = np.asarray(decode(jnp.arange(SIZES[dtype] + 1).astype(dtype), jnp.ones(1)))
    rng = np.random.default_rng(0)
    x = np.concatenate([[1.0, 0.0], 10 ** rng.uniform(-6.4, 0, 254)]).astype(np.float32)
    nearest = np.abs(x[:, None] - values).argmin(axis=1)
    np.testing.assert_array_equal(encode(jnp.asarray(x), jnp.ones(1), 0.5, dtype), nearest)
    if dtype == jnp.int8:
        np.testing.assert_array_equal(encode(jnp.asarray(-x), jnp.ones(1), 0.5, dtype), -nearest)


@pytest.mark.parametrize("dim", [1, 7, 16, 100, 256, 576, 700, 1024])
def test_blocks_of_256_keep_their_largest_value(dim):
    x = np.random.default_rng(0).normal(size=(3, 5, dim)).astype(np.float32)
    scales = block_scales(x)
    blocks = range(0, dim, BLOCK)
    expected = np.stack([np.abs(x[..., start : start + BLOCK]).max(-1) for start in blocks], axis=-1)
    np.testing.assert_array_equal(scales, expected)
    back = np.asarray(decode(encode(x, scales, 0.5, jnp.int8), scales))
    largest = np.abs(x) == np.repeat(expected, BLOCK, axis=-1)[..., :dim]
    np.testing.assert_allclose(back[largest], x[largest], rtol=1e-6)
    # Half of a cell of the largest decade.
    assert (np.abs(back - x) <= 0.0072 * np.repeat(expected, BLOCK, axis=-1)[..., :dim]).all()


def test_a_block_of_zeros_stays_zero():
    for dtype in SIZES:
        codes = encode(jnp.zeros(300), jnp.zeros(2), 0.5, dtype)
        assert not codes.any() and not decode(codes, jnp.zeros(2)).any()


def test_a_small_second_moment_does_not_become_zero():
    codes = encode(jnp.asarray([1.0, 1e-12, 0.0]), jnp.ones(1), 0.5, jnp.uint8)
    assert codes.tolist() == [254, 1, 0]


STORED = {"bfloat16": adam_bf16, "8 bits": adam_8bit}


def root_second_moment(optimizer):
    """Root of Adam's second moment after 1000 gradients of size 1 and 2000 of 0.25; every 256th stays at 1."""
    shape = (8, 512)
    large = jnp.broadcast_to(jnp.arange(512) % BLOCK == 0, shape)
    sizes = jnp.where(jnp.arange(3000) < 1000, 1.0, 0.25)

    def update(state, inputs):
        size, key = inputs
        sign = jax.random.rademacher(key, shape, jnp.float32)
        return optimizer.update({"up": {"kernel": jnp.where(large, 1.0, size) * sign}}, state)[1], None

    def run(state):
        return jax.lax.scan(update, state, (sizes, jax.random.split(jax.random.key(1), 3000)))[0]

    state = jax.jit(run)(optimizer.init({"up": {"kernel": jnp.zeros(shape)}}))
    nu = state.nu["up"]["kernel"]
    nu = decode(nu, state.nu_scale["up"]["kernel"]) if nu.dtype == jnp.uint8 else nu.astype(jnp.float32)
    return np.sqrt(nu[~large])


@pytest.mark.parametrize("store", STORED.values(), ids=STORED)
def test_a_second_moment_survives_updates_smaller_than_the_steps_between_its_values(store, monkeypatch):
    exact = root_second_moment(ADAM)
    np.testing.assert_allclose(exact, exact[0], rtol=1e-4)
    kept = root_second_moment(store(ADAM))
    np.testing.assert_allclose(kept.mean(), exact[0], rtol=0.02)
    assert (np.abs(kept / exact - 1) < 0.35).mean() > 0.99
    # Rounded to nearest, it is stuck: what the noise is for.
    half = jnp.uint16(2**15)
    monkeypatch.setattr(
        "jaxpost.train.moments._noise", lambda tree, _: jax.tree.map(lambda leaf: jnp.full(leaf.shape, half), tree)
    )
    assert abs(root_second_moment(store(ADAM)).mean() / exact[0] - 1) > 0.2


def test_rounding_to_bfloat16_is_right_on_average():
    state = optax.ScaleByAdamState(jnp.int32(0), {"kernel": jnp.zeros(2**16)}, {"kernel": jnp.ones(2**16)})
    state = jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.int32 else leaf.astype(jnp.bfloat16), state)
    optimizer = adam_bf16(optax.scale_by_adam(b2=0.999))
    _, first = jax.jit(optimizer.update)({"kernel": jnp.zeros(2**16)}, state)
    nu = np.asarray(first.nu["kernel"], np.float32)
    assert set(np.unique(nu)) == {np.float32(1 - 2**-8), np.float32(1)}
    np.testing.assert_allclose(nu.mean(), 0.999, atol=3e-5)  # 4 standard errors
    _, second = jax.jit(optimizer.update)({"kernel": jnp.zeros(2**16)}, state._replace(count=jnp.int32(1)))
    assert (np.asarray(second.nu["kernel"], np.float32) != nu).any()  # other noise at another step


def regression_losses(optimizer, steps=300):
    """Losses of a noisy linear regression with badly scaled inputs, 64 rows a step."""
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(size=128)).astype(np.float32)
    truth = jnp.asarray(rng.normal(size=(128, 512)) / scales[:, None], jnp.float32)
    optimizer = optax.chain(optimizer, optax.scale(-1e-2))

    def step(carry, key):
        params, state = carry
        inputs = scales * jax.random.normal(key, (64, 128))
        noise = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (64, 512))

        def loss_of(params):
            return jnp.mean((inputs @ (params["up"]["kernel"] - truth) - noise) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    params = {"up": {"kernel": jnp.zeros((128, 512))}}
    keys = jax.random.split(jax.random.key(0), steps)
    return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[1])((params, optimizer.init(params))))


@pytest.mark.parametrize("store", STORED.values(), ids=STORED)
def test_the_loss_of_a_regression_stays_with_adam_in_float32(store):
    exact, stored = regression_losses(ADAM), regression_losses(store(ADAM))
    assert exact[-1] < 0.1 * exact[0]
    np.testing.assert_allclose(stored, exact, rtol=0.01)


def test_bytes_of_the_state():
    shapes = {"embedding": (512, 64), "kernel": (2, 256, 1536), "lora_b": (2, 16, 256), "lora_a": (9, 64, 16)}
    shapes |= {"scale": (9, 1024), "bias": (2, 4096)}
    params = {"m": {name: jnp.zeros(shape) for name, shape in shapes.items()}}

    def bytes_of(optimizer):
        """Of the state, for each element of each parameter."""
        leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, params))
        return {
            name: sum(
                leaf.size * leaf.dtype.itemsize for path, leaf in leaves if path_of(path).endswith(name) and leaf.ndim
            )
            / np.prod(shape)
            for name, shape in shapes.items()
        }

    assert bytes_of(ADAM) == dict.fromkeys(shapes, 8)
    assert bytes_of(adam_bf16(ADAM)) == dict.fromkeys(shapes, 4)
    # Two codes, and two scales for 256 of them. As in bitsandbytes, embeddings and small arrays stay float32.
    coded = 2 + 2 * 4 / BLOCK
    wide = {"embedding": 8, "lora_a": 8, "scale": 8}
    assert bytes_of(adam_8bit(ADAM)) == {"kernel": coded, "lora_b": coded, "bias": coded, **wide}


def test_blocks_that_straddle_devices_move_only_small_arrays():
    """384 = 1.5 blocks a device: between devices go the largest values of runs of 32, not the moments."""
    mesh = make_mesh("fsdp=4,tensor=2")
    params = {"up": {"kernel": jnp.zeros((64, 768))}}
    optimizer = adam_8bit(ADAM)
    state = jax.eval_shape(optimizer.init, params)
    layout = shardings(params, mesh), shardings(state, mesh)
    program = jax.jit(optimizer.update, in_shardings=layout, out_shardings=layout).lower(params, state).compile()
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", program.as_text())
    sizes = [np.prod([int(dim) for dim in shape.split(",")]) for shape in moved]
    assert sizes and max(sizes) <= 64 * 768 / 32
