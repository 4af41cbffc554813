"""Loading and exporting a large checkpoint: speed against the disk's own, and host memory above the model itself.

    python tools/bench/load.py [--gigabytes 4] [--dtype bfloat16] [--parameters DTYPE] [--mesh fsdp=8] [--rounds 3]

Writes a random Llama in shards to a temporary folder. Each round is a fresh process with fake devices, which reads the
files from end to end, loads them, exports the model and writes as many bytes plainly; files leave the page cache
before they are read, and are on the disk before a write counts as done. Speeds are of the files' bytes. Memory is the
peak during loading or exporting, less that before loading, less the model's own bytes: of all resident pages (which
counts mapped files, that the kernel may take back), and of the process's own. Before each measurement, memory is taken
and given back, since a virtual machine may be slow to get memory that it has not used for long. Linux only.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy its bfloat16
import numpy as np
from measure import said

CHUNK = 2**23
SHARD = 10**9
# Keeping all but the exponent's highest bit of random bits leaves finite numbers between -2 and 2.
FINITE = {"bfloat16": (np.uint16, 0xBFFF), "float16": (np.uint16, 0xBFFF), "float32": (np.uint32, 0xBFFFFFFF)}
ROWS = ("read", "load", "write", "export")


def llama(gigabytes: float, dtype: str, vocab_size: int) -> dict[str, Any]:
    """The config of a Llama of about this size: 2048 wide, as many layers as it takes."""
    width, mlp_dim, kv_dim = 2048, 8192, 512
    layer = 2 * width * (width + kv_dim) + 3 * width * mlp_dim
    left = gigabytes * 1e9 / np.dtype(dtype).itemsize - 2 * vocab_size * width
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": max(1, round(left / layer)),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights, layer after layer, as transformers orders them."""
    import jax
    from flax import nnx
    from safetensors.numpy import save_file

    from jaxpost.models.families import read_config, rows_of
    from jaxpost.models.hf import parameter_shapes
    from jaxpost.models.rows import hf_tensors
    from jaxpost.models.transformer import Decoder

    model = read_config(config, "benchmark")
    weights = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))))
    tensors = hf_tensors(rows_of(model), parameter_shapes(weights))
    rng, (bits, mask) = np.random.default_rng(0), FINITE[config["dtype"]]
    dtype = np.dtype(config["dtype"])
    shard: dict[str, np.ndarray] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name in sorted(tensors):
        values = np.frombuffer(rng.bytes(tensors[name].size * dtype.itemsize), bits) & bits(mask)
        shard[name] = values.view(dtype).reshape(tensors[name].shape)
        if sum(array.nbytes for array in shard.values()) > SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    assert jax.default_backend() == "cpu"


def forget(files: list[Path]) -> None:
    """Let the files leave the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def write_plainly(path: Path, size: int) -> None:
    buffer = os.urandom(CHUNK)
    with open(path, "wb", buffering=0) as opened:
        for _ in range(math.ceil(size / CHUNK)):
            opened.write(buffer)
        os.fsync(opened.fileno())
    path.unlink()


def warm(size: int) -> None:
    """Touch this much memory, and give it back."""
    np.ones(size, np.uint8)


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class Peaks:
    """Peak memory of a block, in bytes: resident pages, and those of them that are the process's own."""

    def __init__(self) -> None:
        self.resident = self.own = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.005):
                self.own = max(self.own, status("RssAnon"))

        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        thread = threading.Thread(target=sample)
        thread.start()
        yield
        done.set()
        thread.join()
        self.resident = status("VmHWM")


def run_round(args: argparse.Namespace) -> dict[str, Any]:
    """One round, in this process."""
    import jax
    from flax import nnx

    from jaxpost import from_pretrained, save_pretrained
    from jaxpost.sharding import make_mesh

    mesh, folder = make_mesh(args.mesh), Path(args.round)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        warm(3 * size)  # the model, the files in the page cache, and some more
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin

    forget(files)
    with timed("read"):
        read_plainly(files)
    forget(files)
    base, loading, exporting = (status("VmRSS"), status("RssAnon")), Peaks(), Peaks()
    with timed("load"), loading.watch():
        model = from_pretrained(folder, dtype=args.parameters or args.dtype, mesh=mesh)
        jax.block_until_ready(nnx.state(model))
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        with timed("export"), exporting.watch():
            save_pretrained(model, None, Path(out) / "model")
        exported = sum(file.stat().st_size for file in (Path(out) / "model").iterdir())
    with timed("write"):
        write_plainly(folder.parent / "plain", exported)
    sizes = {"read": size, "load": size, "write": exported, "export": exported}
    return {
        "gb_per_second": {name: sizes[name] / seconds[name] / 1e9 for name in ROWS},
        "above_mb": {
            name: [(peak - before - own) / 1e6 for peak, before in zip((p.resident, p.own), base, strict=True)]
            for name, p in (("load", loading), ("export", exporting))
        },
        "model_gb": own / 1e9,
    }


def show(result: dict[str, Any]) -> None:
    speed = result["gb_per_second"]
    for name, plain in (("load", "read"), ("export", "write")):
        resident, own = result["above_mb"][name]
        print(
            f"{name:6} {speed[name]:5.2f} GB/s, disk {speed[plain]:5.2f} GB/s: {speed[name] / speed[plain]:4.2f}x;"
            f" peak above the model {resident:5.0f} MB, {own:5.0f} MB of it own",
            flush=True,
        )


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--dtype", choices=list(FINITE), default="bfloat16", help="of the checkpoint")
    parser.add_argument("--parameters", choices=list(FINITE), help="dtype to load them in; by default the same")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--mesh", default="fsdp=8")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", help="folder to keep the checkpoint in, and to take it from if it is there")
    parser.add_argument("--round", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.round:
        print(json.dumps(run_round(args)))
        return
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={args.devices}",
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary) / "checkpoint"
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True)
            make_checkpoint(folder, llama(args.gigabytes, args.dtype, args.vocab_size))
        rounds = []
        for _ in range(args.rounds):
            rounds.append(said([__file__, *sys.argv[1:], "--round", str(folder)]))
            show(rounds[-1])
    print(f"median of {len(rounds)} rounds, a model of {rounds[0]['model_gb']:.2f} GB")
    show(median(rounds))


def median(results: list[Any]) -> Any:
    """The median of each number of equally built results."""
    if isinstance(results[0], dict):
        return {name: median([result[name] for result in results]) for name in results[0]}
    if isinstance(results[0], list):
        return [median(list(column)) for column in zip(*results, strict=True)]
    return statistics.median(results)


if __name__ == "__main__":
    main()
