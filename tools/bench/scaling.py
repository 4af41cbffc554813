"""How the cost of a training step grows: seconds over width, depth, rows and their length, and work over devices.

    python tools/bench/scaling.py [--rounds 3]
    python tools/bench/scaling.py --devices 1 2 4 8

A Llama of random numbers is trained by SFT, AdamW included; one size is doubled at a time, the others stay. The fitted
exponent is the slope of log seconds over log size: 1 is linear. Width is that of all of a layer, so its matrices grow
with the square: it is compared with the parameters. Sizes alternate, the best of --rounds counts. --devices compiles
the same step for so many fake devices and counts what one of them computes, holds and receives: a machine that is
split up cannot show their speed.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import store

SIZES = {"width": [256, 512, 1024], "depth": [4, 8, 16], "rows": [2, 4, 8], "length": [128, 256, 512]}
BASE = {"width": 512, "depth": 8, "rows": 4, "length": 256}
VOCABULARY, HEAD = 8192, 64


def make_step(width: int, depth: int, rows: int, length: int, mesh: Any) -> tuple[Any, Any, Any]:
    """A compiled step, its state and its batch, on a mesh that is set."""
    import optax
    from flax import nnx

    from jaxpost.models.actor_critic import trainable_of
    from jaxpost.models.config import Compute
    from jaxpost.models.families import read_config
    from jaxpost.models.hf import place
    from jaxpost.models.transformer import Decoder
    from jaxpost.objectives.sft import SFT
    from jaxpost.sharding import put
    from jaxpost.train import step
    from jaxpost.train.state import create_state

    fields = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD,
    }
    compute, optimizer = Compute(remat="none"), optax.adamw(1e-4)
    model = place(Decoder(read_config(fields, "bench"), rngs=nnx.Rngs(0)), compute, mesh)
    graphdef, state = create_state(model, optimizer, trainable_of(model), mesh)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (rows, length), np.int32)
    batch = put(
        {
            "tokens": tokens,
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
            "segments": np.ones_like(tokens),
            "loss_mask": np.broadcast_to(np.arange(length) > 0, tokens.shape).astype(np.float32),
        },
        mesh,
    )
    made = step.make_step(SFT(), graphdef, state, optimizer, lambda _: 1e-4, max_grad_norm=1.0, num_micro_batches=1)
    return made.lower(state, batch).compile(), state, batch


def timer(sizes: dict[str, int], mesh: Any) -> tuple[Callable[[], float], int]:
    """What trains a step and tells its seconds; and the number of parameters."""
    import jax

    step, state, batch = make_step(**sizes, mesh=mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def run() -> float:
        nonlocal state
        began = time.perf_counter()
        state, report = step(state, batch)
        jax.block_until_ready(report)
        return time.perf_counter() - began

    run()
    return run, count


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def grow(rounds: int) -> dict[str, Any]:
    """Seconds by what is doubled; prints them with the exponents."""
    import jax

    from jaxpost.sharding import make_mesh

    mesh, found = make_mesh(None, jax.devices()[:1]), {}
    with jax.set_mesh(mesh):
        for name, sizes in SIZES.items():
            timers = [timer(BASE | {name: size}, mesh) for size in sizes]
            seconds = np.min([[run() for run, _ in timers] for _ in range(rounds)], axis=0).tolist()
            over = [count for _, count in timers] if name == "width" else sizes
            of = "parameters" if name == "width" else name
            slope = exponent(over, seconds)
            found[name] = {"sizes": sizes, "of": of, "over": over, "seconds": seconds, "exponent": slope}
            said = ", ".join(f"{size}: {each:.3f} s" for size, each in zip(sizes, seconds, strict=True))
            print(f"{name:8} {said}; seconds ~ {of}^{slope:.2f}", flush=True)
    return found


def spread(devices: list[int]) -> dict[str, Any]:
    """What one device does of the same step, by how many there are; prints it with the exponents."""
    import jax

    from jaxpost.planning.hlo import program_cost
    from jaxpost.sharding import make_mesh

    rows: dict[str, list[float]] = {"flops": [], "arguments": [], "temporaries": [], "received": []}
    for count in devices:
        mesh = make_mesh(None, jax.devices()[:count])
        with jax.set_mesh(mesh):
            step, _, _ = make_step(**BASE | {"rows": max(devices)}, mesh=mesh)
        cost, memory = program_cost(step.as_text()), step.memory_analysis()
        rows["flops"].append(cost.flops)
        rows["arguments"].append(memory.argument_size_in_bytes)
        rows["temporaries"].append(memory.temp_size_in_bytes)
        rows["received"].append(sum(each.times * each.bytes for each in cost.transfers))
    print("of a device " + "".join(f"{count:>12}" for count in devices))
    for name, values in rows.items():
        fitted = f"  ~ devices^{exponent(devices, values):.2f}" if min(values) else ""
        print(f"{name:12}" + "".join(f"{value:12.3g}" for value in values) + fitted)
    return {"devices": devices, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, nargs="+", help="count the work of one of so many, and time nothing")
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    if args.devices:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(args.devices)}"
        found, what = spread(args.devices), "Work of one device"
        slopes = [exponent(args.devices, found[name]) for name in ("flops", "arguments")]
        figure = "FLOPs ~ devices^{:.2f}, bytes held ~ devices^{:.2f}".format(*slopes)
    else:
        found, what = grow(args.rounds), "Growth of a training step's seconds"
        figure = ", ".join(f"{each['of']}^{each['exponent']:.2f}" for each in found.values())
    store(args.output, what, figure, {"found": found})


if __name__ == "__main__":
    main()
