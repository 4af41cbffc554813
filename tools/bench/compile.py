"""Seconds to trace and compile forward and backward of a decoder, by depth.

    python tools/bench/compile.py --layers 8 28 64

The layers are scanned, so a deeper model is not a longer program. Nothing is run and no cache is read.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpost.models.config import Compute
from jaxpost.models.families import read_config
from jaxpost.models.transformer import Decoder
from jaxpost.objectives.sft import SFT

FIELDS = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def seconds(num_layers: int, rows: int, length: int) -> tuple[float, float]:
    """Tracing and compiling of the gradient of the SFT loss."""
    config = read_config({**FIELDS, "num_hidden_layers": num_layers}, "bench")
    graphdef, weights = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, compute=Compute(remat="dots"), rngs=nnx.Rngs(0)))
    )
    columns = dict.fromkeys(("tokens", "positions", "segments"), jnp.int32) | {"loss_mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in columns.items()}
    gradient = jax.jit(jax.grad(lambda weights, batch: SFT().loss(nnx.merge(graphdef, weights), batch)[0].total))
    start = time.perf_counter()
    lowered = gradient.lower(weights, batch)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 28, 64])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    seconds(2, args.rows, args.length)
    for number in range(args.rounds):
        for layers in args.layers:
            traced, compiled = seconds(layers, args.rows, args.length)
            print(f"round {number}: {layers:3d} layers, traced {traced:.2f} s, compiled {compiled:.2f} s", flush=True)


if __name__ == "__main__":
    main()
