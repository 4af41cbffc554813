"""What this machine can do at best: matrix products and copies, by XLA and by torch, alternating.

    python tools/bench/ceiling.py [--rows 64 1024 2048] [--rounds 3] [--dtypes float32 bfloat16]

The products are those of SmolLM2-135M's layers (or --kernel IN OUT), one after the other: GFLOP/s of all of them
together. A copy reads and writes half a gigabyte: GB/s of both. Each side runs in a process of its own; the best of
all rounds counts, since whatever else the machine does only takes away. Without torch XLA's side alone.
"""

import argparse
import importlib.util
import json

from limits import Kernel, Library, Torch, Xla
from measure import in_turn, rate, store

KERNELS = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]


def kernels(args: argparse.Namespace) -> list[Kernel]:
    """[in, out] of the matrices that rows are multiplied with."""
    return [tuple(args.kernel)] if args.kernel else KERNELS


def speeds(args: argparse.Namespace, library: Library) -> dict[str, float]:
    """By what is measured: GFLOP/s of products, GB/s of a copy."""
    found = {"copy, GB/s": library.copied() / 1e9}
    for dtype in args.dtypes:
        for rows in args.rows:
            flops = sum(2 * rows * m * n for m, n in kernels(args))
            product = library.product(rows, kernels(args), dtype)
            found[f"{dtype} at {rows} rows, GFLOP/s"] = rate(flops, product) / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kernel", type=int, nargs=2, metavar=("IN", "OUT"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--only", choices=["xla", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(speeds(args, Xla() if args.only == "xla" else Torch(args.threads))))
        return
    names = ["xla"] + ["torch"] * (importlib.util.find_spec("torch") is not None)
    flags = [word for name in ("rows", "dtypes") for word in (f"--{name}", *map(str, getattr(args, name)))]
    flags += ["--threads", str(args.threads)]
    flags += ["--kernel", *map(str, args.kernel)] if args.kernel else []
    sides = {name: [__file__, *flags, "--only", name] for name in names}
    best: dict[str, dict[str, float]] = {name: {} for name in names}
    for name, found in in_turn(sides, args.rounds):
        best[name] = {what: max(figure, best[name].get(what, 0.0)) for what, figure in found.items()}
    print(" " * 34 + "".join(f"{name:>10}" for name in names))
    for what in best["xla"]:
        print(f"{what:34}" + "".join(f"{best[name][what]:10.1f}" for name in names))
    figure = "; ".join(
        f"{what} " + ", ".join(f"{name} {best[name][what]:.0f}" for name in names) for what in best["xla"]
    )
    store(args.output, "Matrix products of SmolLM2-135M's layers, and a copy", figure, {"best": best})


if __name__ == "__main__":
    main()
