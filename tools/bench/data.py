"""Preparing data: jaxpost against TRL, alternating; how full packed rows are; host memory; waiting for input.

    python tools/bench/data.py --model MODEL [--dataset ROWS.jsonl] [--memory] [--share [MODEL]] [--json FILE]

Preparing is what happens between a `datasets.Dataset` of conversations, memory-mapped as `load_dataset` gives it, and
rows of --max_length tokens with their loss masks: the chat template, tokenising, packing. That is `encode_sft` of
jaxpost and `SFTTrainer._prepare_dataset` of TRL, once without and once with dataset_num_proc, with the same tokenizer
and without either's cache. Reading the file, loading a model and a first call on WARM rows are not counted. Each round
starts a fresh process for each. Needs the parity extra.

--memory: by how much a process's own memory grows while SFTTrainer prepares a .jsonl file, of N, 4 N and 16 N rows.
--share: the share of a step that waits for its batch, in the last half of a run of packed rows; of a model of two
layers, whose steps are short, unless another one is named.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from load import Peaks, status
from measure import said

WARM = 64  # rows of the call that is not counted: imports, compiling the template
VOCABULARY_OF = 64  # the vocabulary of a tiny model is rounded up to a multiple of this
PROCESSES = 2  # of TRL's dataset_num_proc


def conversations(dataset: str | None, count: int) -> tuple[list[dict[str, Any]], str]:
    """So many rows of `messages`, and what they are."""
    if dataset is None:
        from jaxpost.data.word_problems import generate

        rows, name = list(generate(count)), "jaxpost.data.word_problems"
    else:
        with open(dataset, encoding="utf-8") as lines:
            rows, name = [json.loads(line) for line in islice(lines, count)], Path(dataset).name
    chats = [row["messages"] if "messages" in row else row["prompt"] + row["completion"] for row in rows]
    # A repeated row gets a number, so that it is another text.
    varied = [
        [{**chat[0], "content": f"({i // len(chats)}) {chat[0]['content']}"}, *chat[1:]] if i >= len(chats) else chat
        for i, chat in ((i, chats[i % len(chats)]) for i in range(count))
    ]
    repeated = f", {len(chats):,} of them different and then numbered" if len(chats) < count else ""
    return [{"messages": chat} for chat in varied], f"{count:,} conversations of {name}{repeated}"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def read(file: str) -> Any:
    """A memory-mapped Dataset."""
    import datasets

    datasets.disable_caching()
    return datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(Path(file).parent / "arrow"))


def load_tokenizer(model: str) -> Any:
    from jaxpost.models.checkpoint import open_checkpoint

    return open_checkpoint(model).tokenizer()


def prepare_jaxpost(args: argparse.Namespace) -> dict[str, float]:
    from jaxpost import SFTConfig
    from jaxpost.data.rows import as_rows
    from jaxpost.data.tokenizer import prepare_tokenizer
    from jaxpost.encode import encode_sft

    config = SFTConfig(packing=True, max_length=args.max_length, tokenized_cache_dir="")
    tokenizer, rows = prepare_tokenizer(load_tokenizer(args.model), config), read(args.rows_file)

    def prepare(rows: Any) -> Any:
        return encode_sft(as_rows(rows, "rows"), tokenizer, config, vocab_size=len(tokenizer), training=True).packs

    cost, packs = timed(prepare, rows)
    return cost | fullness(int(packs.sizes.sum()), len(packs), args.max_length)


def prepare_trl(args: argparse.Namespace, num_proc: int | None) -> dict[str, float]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer, rows = load_tokenizer(args.model), read(args.rows_file)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=args.max_length,
            dataset_num_proc=num_proc,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        few = rows.select(range(WARM))
        trainer = SFTTrainer(model, config, train_dataset=few, processing_class=tokenizer)
        cost, packed = timed(lambda rows: trainer._prepare_dataset(rows, tokenizer, config, True, None, "train"), rows)
    return cost | fullness(sum(map(len, packed["input_ids"])), len(packed), args.max_length)


def timed(prepare: Callable[[Any], Any], rows: Any) -> tuple[dict[str, float], Any]:
    """What it costs on all rows, and its result; the processor time is that of all threads and child processes."""
    prepare(rows.select(range(WARM)))
    begin, before = time.perf_counter(), sum(os.times()[:4])
    result = prepare(rows)
    seconds, cpu = time.perf_counter() - begin, sum(os.times()[:4]) - before
    return {"seconds": seconds, "cpu_seconds": cpu, "rows_per_second": len(rows) / seconds}, result


def fullness(tokens: int, packed_rows: int, max_length: int) -> dict[str, float]:
    return {"tokens": tokens, "packed_rows": packed_rows, "full": tokens / (packed_rows * max_length)}


PREPARATIONS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "jaxpost": prepare_jaxpost,
    "trl": functools.partial(prepare_trl, num_proc=None),
    f"trl, {PROCESSES} processes": functools.partial(prepare_trl, num_proc=PROCESSES),
}


@functools.cache
def tiny_model(model: str) -> tuple[Any, Any]:
    """A model of two layers for a tokenizer, and that tokenizer."""
    from flax import nnx

    from jaxpost.models.families import read_config
    from jaxpost.models.transformer import Decoder

    tokenizer = load_tokenizer(model)
    fields = {
        "model_type": "llama",
        "vocab_size": -(-len(tokenizer) // VOCABULARY_OF) * VOCABULARY_OF,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return Decoder(read_config(fields, "tiny"), rngs=nnx.Rngs(0)), tokenizer


def make_trainer(args: argparse.Namespace, folder: str, rows: str, **options: Any) -> Any:
    """A trainer of a .jsonl file."""
    from jaxpost import SFTConfig, SFTTrainer

    shared = {"output_dir": folder, "dataset_name": rows, "max_length": args.max_length, "tokenized_cache_dir": ""}
    config = SFTConfig(**shared, report_to=["none"], save_strategy="no", **options)
    model, tokenizer = (None, None) if config.model_name_or_path else tiny_model(args.model)
    return SFTTrainer(model, config, processing_class=tokenizer)


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak growth of this process's own memory while a trainer prepares the rows."""
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        with open(args.rows_file, encoding="utf-8") as lines:
            few.write_text("".join(islice(lines, WARM)), encoding="utf-8")
        make_trainer(args, folder, str(few), packing=args.packing)
        before, peaks = status("RssAnon"), Peaks()
        with peaks.watch():
            make_trainer(args, folder, args.rows_file, packing=args.packing)
    return {"mb": (peaks.own - before) / 1e6}


def measure_share(args: argparse.Namespace) -> dict[str, float]:
    """Share of the time of the last half of the steps that was spent waiting for input."""
    options = {} if args.share == "tiny" else {"model_name_or_path": args.share}
    steps = {"max_steps": args.steps, "logging_steps": args.steps // 2, "per_device_train_batch_size": args.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(args, folder, args.rows_file, packing=True, **steps, **options).train()
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in log if row["step"] == args.steps)
    return {"step_seconds": last["step_time"], "share": last["input_share"]}


def run(args: argparse.Namespace, only: str, rows_file: Path, *flags: str) -> dict[str, float]:
    """Measure one thing in a process of its own."""
    return said([__file__, *sys.argv[1:], "--only", only, "--rows_file", str(rows_file), *flags])


def compare(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Preparing by each, in turns; prints the table."""
    rows, what = conversations(args.dataset, args.rows)
    write(folder / "rows.jsonl", rows)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PREPARATIONS}
    for number in range(args.rounds):
        for name, results in runs.items():
            results.append(run(args, name, folder / "rows.jsonl"))
            print(f"round {number + 1}, {name}: {results[-1]['seconds']:.2f} s", flush=True)
    print(f"\n{what}\npacked into rows of {args.max_length:,} tokens; medians of {args.rounds} (lowest to highest)")
    columns = "{:18}{:>22}{:>8}{:>8}{:>24}{:>12}{:>13}{:>7}"
    titles = ("", "seconds", "CPU s", "rows/s", "jaxpost is faster by", "tokens", "packed rows", "full")
    print(columns.format(*titles))
    for name, results in runs.items():
        median = {key: statistics.median(result[key] for result in results) for key in results[0]}
        ratios = [one["seconds"] / ours["seconds"] for one, ours in zip(results, runs["jaxpost"], strict=True)]
        cells = (
            spread([result["seconds"] for result in results], "{:.2f}"),
            f"{median['cpu_seconds']:.2f}",
            f"{median['rows_per_second']:,.0f}",
            "" if name == "jaxpost" else spread(ratios, "{:.1f}x"),
            f"{median['tokens']:,.0f}",
            f"{median['packed_rows']:,.0f}",
            f"{median['full']:.1%}",
        )
        print(columns.format(name, *cells), flush=True)
    return runs


def spread(values: list[float], form: str) -> str:
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def grow(args: argparse.Namespace, folder: Path) -> dict[str, dict[int, float]]:
    """Memory by the number of rows, packed and not; prints a line for each."""
    found: dict[str, dict[int, float]] = {"packed": {}, "not packed": {}}
    for count in (args.memory_rows * times for times in (1, 4, 16)):
        file = folder / f"{count}.jsonl"
        write(file, conversations(args.dataset, count)[0])
        for name, sizes in found.items():
            sizes[count] = run(args, "memory", file, *["--packing"] * (name == "packed"))["mb"]
            megabytes = file.stat().st_size / 1e6
            print(f"memory, {name}: {count:,} rows ({megabytes:.0f} MB) take {sizes[count]:.0f} MB at most", flush=True)
    return found


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or .gguf file, for its tokenizer")
    parser.add_argument("--dataset", help="conversations, .jsonl; by default word problems")
    parser.add_argument("--rows", type=int, default=7000)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="0 to leave the comparison out")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory_rows", type=int, default=4000, help="N of --memory")
    parser.add_argument("--share", nargs="?", const="tiny", metavar="MODEL")
    parser.add_argument("--steps", type=int, default=20, help="of --share")
    parser.add_argument("--batch_size", type=int, default=1, help="of --share")
    parser.add_argument("--json", help="file for all results")
    for name in ("--only", "--rows_file"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--packing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure = {**PREPARATIONS, "memory": measure_memory, "share": measure_share}[args.only]
        print(json.dumps(measure(args)))
        return
    results: dict[str, Any] = {"flags": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        if args.rounds:
            results["preparing"] = compare(args, Path(folder))
        if args.memory:
            results["memory_mb"] = grow(args, Path(folder))
        if args.share:
            file = Path(folder) / "share.jsonl"
            write(file, conversations(args.dataset, args.rows)[0])
            found = results["share"] = run(args, "share", file)
            print(f"waiting for input: {found['share']:.2%} of a step of {found['step_seconds']:.3f} s ({args.share})")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
