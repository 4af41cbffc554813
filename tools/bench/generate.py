"""Generation on this machine: jaxpost against transformers, the same requests, both float32, alternating.

    python tools/bench/generate.py --model MODEL [--dataset PROMPTS.jsonl] [--prompts 64] [--batch_size 64] [--rounds 3]
    python tools/bench/generate.py --model MODEL --prompts 8 --num_return_sequences 8 --against separate transformers
    python tools/bench/generate.py --model MODEL --batch_size 16 --against dealt transformers

Completions are sampled at temperature 1 from the whole vocabulary and end after --shortest to --longest tokens, as a
fixed seed has it, in place of an end token: `limits` of jaxpost, a StoppingCriteria of transformers, which neither
knows in advance. transformers is given batches of --batch_size, one after the other. Other ways of using jaxpost:
`separate` reads each prompt anew for each of its completions, `dealt` finishes --batch_size requests before it takes
the next. Those draw the same tokens, and it is printed how many do.

Each round starts a fresh process for each side, which does everything twice: the second time counts, and what the
first took longer is told as the compilation. Only tokens of completions count. Below stands the least time: of every
decoding step the greater of reading the weights and the cache and of multiplying the rows that still go on, then of
multiplying the prompts, at the speeds that jaxpost or torch reach here on their own. Needs the parity extra.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from limits import Kernel, Library, Torch, Xla
from measure import Comparison, in_turn, rate, store
from train import as_folder

ROWS = 64  # of the matrix that is multiplied with kernels while decoding
PROMPT_ROWS = 1024  # while reading prompts
Shapes = Counter[Kernel]  # how often one is there


def make_requests(args: argparse.Namespace) -> dict[str, Any]:
    """Token ids of prompts, how long the completions of each become, and what reading and writing a token takes."""
    from jaxpost.data.chat import encode_prompt
    from jaxpost.data.rows import take
    from jaxpost.data.sources import load_rows
    from jaxpost.data.word_problems import MIN_ROWS, generate
    from jaxpost.models.families import read_config
    from jaxpost.models.pretrained import open_source

    source = open_source(args.model)
    config = read_config(source.checkpoint.config, args.model)
    if args.dataset:
        asked = take(load_rows(args.dataset, "train"), args.prompts)["prompt"]
    else:
        asked = [row["prompt"] for row in generate(max(MIN_ROWS, args.prompts))[: args.prompts]]
    tokenizer = source.tokenizer()
    prompts = [encode_prompt(prompt, tokenizer, vocab_size=config.vocab_size).tolist() for prompt in asked]
    limits = np.random.default_rng(args.seed).integers(args.shortest, args.longest + 1, len(prompts)).tolist()
    return {
        "prompts": prompts,
        "limits": limits,
        "cached_bytes": 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim,
    }


def run_jaxpost(args: argparse.Namespace, requests: dict[str, Any]) -> dict[str, Any]:
    from jaxpost import from_pretrained
    from jaxpost.rl.generate import Completion, generate

    model = from_pretrained(args.model)
    prompts, limits, each = (
        [np.array(ids) for ids in requests["prompts"]],
        requests["limits"],
        args.num_return_sequences,
    )
    options = {"max_new_tokens": args.longest, "eos_ids": [], "seed": args.seed, "batch_size": args.batch_size}
    if args.only == "separate":
        prompts, limits, each = [ids for ids in prompts for _ in range(each)], np.repeat(limits, each).tolist(), 1
    size = args.batch_size // each if args.only == "dealt" else len(prompts)

    def complete() -> list[Completion]:
        return [
            completion
            for begin in range(0, len(prompts), size)
            for completion in generate(
                model,
                prompts[begin : begin + size],
                limits=limits[begin : begin + size],
                num_return_sequences=each,
                first_request=begin * each,
                **options,
            )
        ]

    seconds, completions = twice(complete)
    assert [len(completion.tokens) for completion in completions] == np.repeat(limits, each).tolist()
    digests = [hashlib.sha256(np.array(completion.tokens).tobytes()).hexdigest() for completion in completions]
    return seconds | {"digests": digests} | speeds(*jax_kernels(model), Xla())


def jax_kernels(model: Any) -> tuple[Shapes, Kernel]:
    """Of its layers, and the last one."""
    import jax
    from flax import nnx

    stacked = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model.layers)) if leaf.ndim == 3]
    shapes = Counter((inside, outside) for layers, inside, outside in stacked for _ in range(layers))
    return shapes, (model.config.embed_dim, model.config.vocab_size)


def run_transformers(args: argparse.Namespace, requests: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    library = Torch(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    model.generation_config.eos_token_id = None
    each = args.num_return_sequences

    class Limits(StoppingCriteria):
        """Ends each row at its own length."""

        def __init__(self, limits: list[int], width: int):
            self.ends = width + torch.tensor(limits, device=device).repeat_interleave(each)

        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return ids.shape[1] >= self.ends

    def complete() -> list[int]:
        """How many tokens were drawn in each batch, where the longest counts."""
        drawn, size = [], max(1, args.batch_size // each)
        for begin in range(0, len(requests["prompts"]), size):
            prompts, limits = (requests[name][begin : begin + size] for name in ("prompts", "limits"))
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
            torch.manual_seed(args.seed)
            tokens = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=args.longest,
                num_return_sequences=each,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Limits(limits, width)]),
            ).tolist()
            drawn.append(len(tokens[0]) - width)
            assert len(tokens) == len(prompts) * each and drawn[-1] == max(limits)
        return drawn

    seconds, _ = twice(complete)
    return seconds | speeds(*torch_kernels(model), library)


def torch_kernels(model: Any) -> tuple[Shapes, Kernel]:
    """Of its layers, and the last one."""
    import torch

    kernels = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    last = tuple(model.get_output_embeddings().weight.shape[::-1])
    return Counter((kernel.shape[1], kernel.shape[0]) for kernel in kernels) - Counter([last]), last


def twice(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """What a run gives, and the seconds of the first and of the second one."""
    times = [time.perf_counter()]
    for _ in range(2):
        given = run()
        times.append(time.perf_counter())
    first, second = np.diff(times).tolist()
    return {"first_seconds": first, "seconds": second}, given


def speeds(shapes: Shapes, last: Kernel, library: Library) -> dict[str, float]:
    """Bytes copied a second; operations a second of a layer's kernels and, while decoding, the last one; and how many
    numbers those are."""

    def speed(rows: int, kernels: Shapes) -> float:
        flops = {shape: 2 * rows * shape[0] * shape[1] for shape in kernels}
        seconds = sum(n * flops[one] / rate(flops[one], library.product(rows, [one])) for one, n in kernels.items())
        return sum(n * flops[shape] for shape, n in kernels.items()) / seconds

    inner = sum(n * shape[0] * shape[1] for shape, n in shapes.items())
    return {
        "copied": library.copied(),
        "inner": inner,
        "weights": inner + last[0] * last[1],
        "decoding_flops": speed(ROWS, shapes + Counter([last])),
        "reading_flops": speed(PROMPT_ROWS, shapes),
    }


def least_seconds(
    args: argparse.Namespace, requests: dict[str, Any], best: dict[str, float]
) -> tuple[float, float, float]:
    """Of decoding with slots that are refilled at once, of reading each prompt once; and the share bound by memory."""
    pairs = zip(requests["prompts"], requests["limits"], strict=True)
    waiting = deque((len(prompt), limit - 1) for prompt, limit in pairs for _ in range(args.num_return_sequences))
    rows: list[tuple[int, int]] = []  # tokens in the cache, and still to come
    decoding = by_memory = 0.0
    while waiting or rows:
        while waiting and len(rows) < args.batch_size:
            rows.append(waiting.popleft())
        cached = requests["cached_bytes"] * sum(tokens for tokens, _ in rows)
        memory = (4 * best["weights"] + cached) / best["copied"]
        compute = 2 * best["weights"] * len(rows) / best["decoding_flops"]
        decoding += max(memory, compute)
        by_memory += memory if memory > compute else 0.0
        rows = [(tokens + 1, left - 1) for tokens, left in rows if left > 1]
    reading = 2 * best["inner"] * sum(map(len, requests["prompts"])) / best["reading_flops"]
    return decoding, reading, by_memory / decoding


def report(args: argparse.Namespace, requests: dict[str, Any], results: dict[str, list[dict]]) -> dict[str, Any]:
    """Print medians, ratios and shares of the least time; return them."""
    tokens = args.num_return_sequences * sum(requests["limits"])
    medians = {name: statistics.median(run["seconds"] for run in runs) for name, runs in results.items()}
    for name in args.against:
        if "digests" in results[name][0]:
            pairs = list(zip(results["jaxpost"][0]["digests"], results[name][0]["digests"], strict=True))
            print(f"the same tokens: {sum(a == b for a, b in pairs)} of {len(pairs)} completions")
    names = ("copied", "decoding_flops", "reading_flops", "inner", "weights")
    best = {name: max(run[name] for runs in results.values() for run in runs) for name in names}
    print(
        "best here: {:.1f} GB/s copied, {:.1f} GFLOP/s at {} rows, {:.1f} at {}".format(
            best["copied"] / 1e9, best["decoding_flops"] / 1e9, ROWS, best["reading_flops"] / 1e9, PROMPT_ROWS
        )
    )
    decoding, reading, by_memory = least_seconds(args, requests, best)
    print(f"least time: {decoding:.1f} s decoding ({by_memory:.0%} of it memory) + {reading:.1f} s reading prompts")
    least = {"decoding": decoding, "reading": reading, "by_memory": by_memory}
    possible = {name: (decoding + reading) / seconds for name, seconds in medians.items()}
    for name, share in possible.items():
        print(f"{name} {medians[name]:.1f} s: {share:.0%} of what is possible")
    return {"tokens": tokens, "medians": medians, "best": best, "least_seconds": least, "possible": possible}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, hub id or .gguf file")
    parser.add_argument("--dataset", help="rows with a prompt; by default word problems")
    parser.add_argument("--against", nargs="+", default=["transformers"], choices=["transformers", "separate", "dealt"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--num_return_sequences", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=16, help="tokens of a completion")
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--requests", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    if args.only:
        run = run_transformers if args.only == "transformers" else run_jaxpost
        print(json.dumps(run(args, json.loads(Path(args.requests).read_text()))))
        return
    if args.batch_size % args.num_return_sequences:
        parser.error("batch_size must be a multiple of num_return_sequences, so that batches hold whole prompts")
    results: dict[str, list[dict]] = {name: [] for name in ("jaxpost", *args.against)}
    with tempfile.TemporaryDirectory() as where:
        model = as_folder(args.model, Path(where))
        requests, file = make_requests(args), Path(where) / "requests.json"
        tokens = args.num_return_sequences * sum(requests["limits"])
        file.write_text(json.dumps(requests))
        shared = [*sys.argv[1:], "--model", model, "--requests", str(file)]
        sides = {name: [__file__, *shared, "--only", name] for name in results}
        for name, run in in_turn(sides, args.rounds):
            results[name].append(run)
            first, seconds = run["first_seconds"], run["seconds"]
            said = f"{tokens / seconds:7.1f} tokens/s {seconds:7.2f} s, and {first - seconds:.1f} s the first time"
            print(f"{name:12} {said}", flush=True)
    told = report(args, requests, results)
    speeds = {name: [tokens / run["seconds"] for run in runs] for name, runs in results.items()}
    what = (
        f"Sampling with {Path(args.model).stem}, {len(requests['limits']) * args.num_return_sequences} completions of "
    )
    what += f"{args.shortest} to {args.longest} tokens, batch {args.batch_size}, float32"
    found = Comparison(speeds, "tokens/s")
    figure = f"{found}; {told['possible']['jaxpost']:.0%} of what the machine could do"
    store(args.output, what, figure, {"runs": results, "ratios": found.ratios} | told)


if __name__ == "__main__":
    main()
