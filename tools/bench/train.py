"""Training on this machine: jaxpost against TRL, alternating, same model, same rows in the same order, both float32.

    python tools/bench/train.py --model MODEL --dataset ROWS.jsonl [--method dpo] [--rounds 3] [--steps 10]
        [--batch_size 4] [--lora 16]

Each round starts a fresh process for either library and trains a few steps through its own trainer, as a user would.
tokens/s counts real tokens (no padding) and rows/s rows, or pairs, from the end of step WARM on. Prints a line a run,
the medians and their ratio, and writes everything to --output as JSON. With --lora both train an adapter of that rank
on every linear layer (TRL through peft), and jaxpost's full fine-tuning is a third run. Needs the parity extra.

With --method grpo rows are prompts with an `answer`, --batch_size counts the completions of a step, 8 of a prompt, and
the reward is 1 where the last number is the answer. Each library learns from what it samples itself: how many tokens
that was is printed too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM = 2  # steps that are not counted: compilation, allocator


def shared(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What both trainers are told, in the names that they share."""
    told = {
        "output_dir": folder,
        "max_steps": args.steps,
        "logging_steps": 1,
        "per_device_train_batch_size": args.batch_size,
        "save_strategy": "no",
    }
    if args.method != "grpo":
        return told | {"train_sampling_strategy": "sequential"}
    return told | {"shuffle_dataset": False, "max_completion_length": args.max_completion_length}


def rewards(args: argparse.Namespace) -> dict[str, Any]:
    """The reward function of methods that take one."""
    from jaxpost.rl.builtin_rewards import numeric_answer

    return {"reward_funcs": numeric_answer} if args.method == "grpo" else {}


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

    rows = take(load_rows(args.dataset, "train"), args.steps * args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        config_class, trainer_class = classes(jaxpost, args.method)
        config = config_class(
            **shared(args, folder),
            **({} if args.method == "grpo" else {"length_buckets": args.length_buckets}),
            gradient_checkpointing=args.gradient_checkpointing,
            report_to=["none"],
        )
        peft_config = adapter(args.lora) if args.lora else None
        trainer = trainer_class(args.model, args=config, train_dataset=rows, peft_config=peft_config, **rewards(args))
        trained = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(trainer.model, trainer.trainable)))
        trainer.train()
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(row["step_time"] for row in log[WARM:])
    if args.method == "grpo":
        phases = ("generation", "reward", "appraise", "host", "input")
        print({name: statistics.mean(row[f"{name}_time"] for row in log[WARM:]) for name in phases}, file=sys.stderr)
    # float32: as many bytes of gradients as of parameters, and twice as many of AdamW's moments
    tokens = log[-1]["num_tokens"] - log[WARM - 1]["num_tokens"]
    return rate(args, seconds, tokens) | {"trained_megabytes": 4 * trained / 1e6}


def run_trl(args: argparse.Namespace) -> dict[str, float]:
    import torch
    import trl
    from datasets import load_dataset
    from transformers import TrainerCallback

    ends: list[tuple[float, float]] = []

    class Timer(TrainerCallback):
        def on_log(self, arguments: object, state: object, control: object, logs: dict, **_: object) -> None:
            if "num_tokens" in logs:
                ends.append((time.perf_counter(), logs["num_tokens"]))

    torch.set_num_threads(args.threads)
    rows = load_dataset("json", data_files=args.dataset, split="train").select(range(args.steps * args.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        config_class, trainer_class = classes(trl, args.method)
        config = config_class(
            **shared(args, folder),
            bf16=args.trl_bf16,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        peft_config = adapter(args.lora) if args.lora else None
        data = {"train_dataset": rows, "peft_config": peft_config} | rewards(args)
        trainer_class(args.model, args=config, callbacks=[Timer()], **data).train()
    (begin, before), (end, after) = ends[WARM - 1], ends[-1]
    return rate(args, end - begin, after - before)


def classes(library: Any, method: str) -> tuple[Any, Any]:
    """Config and trainer of a method, which either library calls the same."""
    name = {"reward": "Reward"}.get(method, method.upper())
    return getattr(library, f"{name}Config"), getattr(library, f"{name}Trainer")


def rate(args: argparse.Namespace, seconds: float, tokens: float) -> dict[str, float]:
    rows = (args.steps - WARM) * args.batch_size
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "rows_per_second": rows / seconds,
    }


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
    parser.add_argument("--max_completion_length", type=int, default=64, help="of grpo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length_buckets", type=int, default=4)
    parser.add_argument("--gradient_checkpointing", type=lambda text: text == "true", default=True)
    parser.add_argument("--trl_bf16", action="store_true", help="TRL's default autocast instead of float32")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter to train; 0 for the whole model")
    parser.add_argument("--only", choices=["jaxpost", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--output", default="bench.json")
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"jaxpost": run_jaxpost, "trl": run_trl}[args.only](args)))
        return
    results: dict[str, list[dict[str, float]]] = {"jaxpost": [], "trl": []} | ({"full": []} if args.lora else {})
    with tempfile.TemporaryDirectory() as where:
        model = as_folder(args.model, Path(where))
        for _ in range(args.rounds):
            for name, runs in results.items():
                library = ["--only", "jaxpost", "--lora", "0"] if name == "full" else ["--only", name]
                command = [sys.executable, __file__, *sys.argv[1:], "--model", model, *library]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                speeds = runs[-1]["tokens_per_second"], runs[-1]["rows_per_second"]
                print("{:8} {:7.1f} tokens/s {:7.3f} rows/s".format(name, *speeds), flush=True)
    medians = {name: statistics.median(run["rows_per_second"] for run in runs) for name, runs in results.items()}
    print("median   " + ", ".join(f"{name} {median:.3f}" for name, median in medians.items()) + " rows/s")
    for name in [name for name in medians if name != "jaxpost"]:
        print(f"jaxpost is {medians['jaxpost'] / medians[name]:.2f}x {name}")
    if args.lora:
        part, whole = (results[name][0]["trained_megabytes"] for name in ("jaxpost", "full"))
        print(f"trained, with gradients and moments: {part:.1f} MB of {whole:.1f} MB ({part / whole:.1%})")
    Path(args.output).write_text(json.dumps({"flags": vars(args), "runs": results, "medians": medians}, indent=2))


if __name__ == "__main__":
    main()
