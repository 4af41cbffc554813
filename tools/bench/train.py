"""Training on this machine: jaxpost against TRL, alternating, same model, same rows in the same order.

    python tools/bench/train.py --model MODEL --dataset ROWS.jsonl [--method dpo] [--rounds 3] [--steps 10]
        [--batch_size 4] [--lora 16] [--bf16 both]

Each round starts a fresh process for either library and trains a few steps through its own trainer, as a user would.
tokens/s counts real tokens (no padding) and rows/s rows, or pairs, from the end of step WARM on. Prints a line a run,
the medians and their ratio, and writes everything to --output as JSON. With --lora both train an adapter of that rank
on every linear layer (TRL through peft), and jaxpost's full fine-tuning is a third run. Parameters are float32, and
so are products without --bf16; bfloat16 is what TRL computes in by default. Needs the parity extra.

With --method grpo rows are prompts with an `answer`, --batch_size counts the completions of a step, 8 of a prompt, and
the reward is 1 where the last number is the answer. Each library learns from what it samples itself: tokens/s counts
tokens of completions, and their mean length and the seconds of each part of a step are printed too; and how many
prompts have completions that are all rewarded alike, which jaxpost does not read again to train on.

    python -m jaxpost.data.word_problems --output_dir problems
    python tools/bench/train.py --method grpo --model MODEL --dataset problems/train.jsonl --batch_size 64
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Comparison, in_turn, store

WARM = 2  # steps that are not counted: compilation, allocator
GROUP = 8  # completions of a prompt
PRECISIONS = {"neither": "float32", "trl": "float32, TRL in bfloat16", "both": "bfloat16"}
PARTS = ("generation", "reward", "appraise")  # of a step of an online method; the rest is training


def shared(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What both trainers are told, in the names that they share."""
    told = {
        "output_dir": folder,
        "max_steps": args.steps,
        "logging_steps": 1,
        "per_device_train_batch_size": args.batch_size // args.accumulation,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_checkpointing": args.gradient_checkpointing,
        "save_strategy": "no",
    }
    if args.method != "grpo":
        return told | {"train_sampling_strategy": "sequential"}
    sampling = {"num_generations": GROUP, "max_completion_length": args.max_completion_length, "temperature": 1.0}
    return told | sampling | {"beta": 0.0, "shuffle_dataset": False}


def num_rows(args: argparse.Namespace) -> int:
    """Of the dataset, that are trained on."""
    return args.steps * args.batch_size // (GROUP if args.method == "grpo" else 1)


def rewards(args: argparse.Namespace) -> dict[str, Any]:
    """The reward function of methods that take one."""
    if args.method != "grpo":
        return {}
    from jaxpost.rl.builtin_rewards import numeric_answer

    return {"reward_funcs": numeric_answer}


def adapter(rank: int) -> Any:
    """LoRA on every linear layer, for either trainer."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def run_jaxpost(args: argparse.Namespace) -> dict[str, float]:
    import jax
    from flax import nnx

    import jaxpost
    from jaxpost.data.rows import take
    from jaxpost.data.sources import load_rows

    rows = take(load_rows(args.dataset, "train"), num_rows(args))
    with tempfile.TemporaryDirectory() as folder:
        config_class, trainer_class = classes(jaxpost, args.method)
        config = config_class(
            **shared(args, folder),
            **({} if args.method == "grpo" else {"length_buckets": args.length_buckets}),
            report_to=["none"],
            bf16=args.bf16 == "both",
        )
        peft_config = adapter(args.lora) if args.lora else None
        trainer = trainer_class(args.model, args=config, train_dataset=rows, peft_config=peft_config, **rewards(args))
        trained = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(trainer.model, trainer.trainable)))
        trainer.train()
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    # float32: as many bytes of gradients as of parameters, and twice as many of AdamW's moments
    found = {"trained_megabytes": 4 * trained / 1e6}
    steps = [row["step_time"] for row in log[WARM:]]
    if args.method == "grpo":
        parts = {name: statistics.mean(row[f"{name}_time"] for row in log[WARM:]) for name in PARTS}
        return found | sampled(args, steps, log[WARM:], parts)
    return found | rate(args, steps, log[-1]["num_tokens"] - log[WARM - 1]["num_tokens"])


def run_trl(args: argparse.Namespace) -> dict[str, float]:
    import torch
    import trl
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl.extras.profiling import ProfilingContext

    ends: list[float] = []
    log: list[dict[str, float]] = []
    spent: list[dict[str, float]] = [{}]

    class Timer(TrainerCallback):
        def on_log(self, arguments: object, state: object, control: object, logs: dict, **_: object) -> None:
            if "num_tokens" in logs:
                ends.append(time.perf_counter())
                log.append(dict(logs))
                spent.append({})

    def note(part: Any, seconds: float) -> None:
        name = part.name.split(".")[-1]
        spent[-1][name] = spent[-1].get(name, 0.0) + seconds

    torch.set_num_threads(args.threads)
    rows = load_dataset("json", data_files=args.dataset, split="train").select(range(num_rows(args)))
    ProfilingContext._log_metrics = note
    with tempfile.TemporaryDirectory() as folder:
        config_class, trainer_class = classes(trl, args.method)
        config = config_class(
            **shared(args, folder),
            bf16=args.bf16 != "neither",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        peft_config = adapter(args.lora) if args.lora else None
        data = {"train_dataset": rows, "peft_config": peft_config} | rewards(args)
        trainer_class(args.model, args=config, callbacks=[Timer()], **data).train()
    steps = [end - begin for begin, end in itertools.pairwise(ends[WARM - 1 :])]
    if args.method == "grpo":
        names = ("generate", "_calculate_rewards", "_prepare_inputs")
        generation, reward, prepared = (statistics.mean(step[name] for step in spent[WARM:-1]) for name in names)
        parts = dict(zip(PARTS, (generation, reward, prepared - generation - reward), strict=True))
        return sampled(args, steps, log[WARM:], parts)
    return rate(args, steps, log[-1]["num_tokens"] - log[WARM - 1]["num_tokens"])


def classes(library: Any, method: str) -> tuple[Any, Any]:
    """Config and trainer of a method, which either library calls the same."""
    name = {"reward": "Reward"}.get(method, method.upper())
    return getattr(library, f"{name}Config"), getattr(library, f"{name}Trainer")


def rate(args: argparse.Namespace, steps: list[float], tokens: float) -> dict[str, Any]:
    """Speeds, of the seconds of each step that counts and of the tokens of all of them."""
    seconds, rows = sum(steps), len(steps) * args.batch_size
    return {
        "seconds": seconds,
        "step_seconds": steps,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "rows_per_second": rows / seconds,
    }


def sampled(
    args: argparse.Namespace, steps: list[float], log: list[dict[str, float]], parts: dict[str, float]
) -> dict[str, Any]:
    """The same of completions, by what is logged of each step; and where the time of a step goes."""
    lengths = [row["completions/mean_length"] for row in log]
    return rate(args, steps, sum(lengths) * args.batch_size) | {
        "completion_length": statistics.mean(lengths),
        "rewarded_alike": statistics.mean(row["frac_reward_zero_std"] for row in log),
        "parts": parts | {"training": statistics.mean(steps) - sum(parts.values())},
    }


def line(name: str, run: dict[str, Any]) -> str:
    """What a run came to."""
    said = f"{name:8} {run['tokens_per_second']:7.1f} tokens/s {run['rows_per_second']:7.3f} rows/s"
    if "parts" not in run:
        return said
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in run["parts"].items())
    step, length, alike = statistics.mean(run["step_seconds"]), run["completion_length"], run["rewarded_alike"]
    return f"{said}; {step:.2f} s a step ({parts}), {length:.1f} tokens a completion, {alike:.0%} rewarded alike"


def as_folder(model: str, where: Path) -> str:
    """TRL reads folders: a GGUF file is written out once."""
    if not model.endswith(".gguf"):
        return model
    from jaxpost import from_pretrained, save_pretrained
    from jaxpost.models.checkpoint import open_checkpoint

    folder = where / Path(model).stem
    if not (folder / "config.json").exists():
        save_pretrained(from_pretrained(model), open_checkpoint(model).tokenizer(), folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, hub id or .gguf file")
    parser.add_argument("--dataset", required=True, help="rows of the method, .jsonl")
    parser.add_argument("--method", default="sft", choices=["sft", "dpo", "kto", "reward", "grpo"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="parts that a batch is trained on in")
    parser.add_argument("--max_completion_length", type=int, default=64, help="of grpo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length_buckets", type=int, default=4)
    parser.add_argument("--gradient_checkpointing", type=lambda text: text == "true", default=True)
    parser.add_argument("--bf16", default="neither", choices=list(PRECISIONS), help="who computes in bfloat16")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter to train; 0 for the whole model")
    parser.add_argument("--only", choices=["jaxpost", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    if args.steps <= WARM or args.batch_size % args.accumulation or (args.method == "grpo" and args.batch_size % GROUP):
        parser.error(f"more than {WARM} steps; batch_size a multiple of accumulation and, with grpo, of {GROUP}")
    if args.only:
        print(json.dumps({"jaxpost": run_jaxpost, "trl": run_trl}[args.only](args)))
        return
    results: dict[str, list[dict[str, float]]] = {"jaxpost": [], "trl": []} | ({"full": []} if args.lora else {})
    with tempfile.TemporaryDirectory() as where:
        model = as_folder(args.model, Path(where))
        shared = [__file__, *sys.argv[1:], "--model", model]
        sides = {name: [*shared, "--only", name] for name in results}
        if args.lora:
            sides["full"] = [*shared, "--only", "jaxpost", "--lora", "0"]
        for name, run in in_turn(sides, args.rounds):
            results[name].append(run)
            print(line(name, run), flush=True)
    speeds = {name: [run["rows_per_second"] for run in runs] for name, runs in results.items()}
    found = Comparison(speeds, "completions/s" if args.method == "grpo" else "rows/s")
    figure = str(found)
    if args.lora:
        part, whole = (results[name][0]["trained_megabytes"] for name in ("jaxpost", "full"))
        figure += f"; trained, with gradients and moments, {part:.1f} MB of {whole:.1f} MB ({part / whole:.1%})"
    tokens = {name: [run["tokens_per_second"] for run in runs] for name, runs in results.items()}
    figure += f"; {Comparison(tokens, 'tokens/s')}"
    store(args.output, title(args), figure, {"runs": results, "ratios": found.ratios})


def title(args: argparse.Namespace) -> str:
    """What is measured, of which model and rows, in which precision."""
    what = args.method.upper() + (f" with LoRA (r {args.lora})" if args.lora else "")
    of = f"of {Path(args.model).stem}, batch {args.batch_size}, rows of {Path(args.dataset).name}"
    return f"{what} {of}, {PRECISIONS[args.bf16]}"


if __name__ == "__main__":
    main()
