"""PPO on this machine: jaxpost against TRL 1.10, the last that has it, alternating, both float32.

    python tools/bench/ppo.py --model MODEL [--dataset PROMPTS.jsonl] [--batch_size 64] [--generations 3] [--rounds 1]

Each round starts a fresh process for either library. Policy, reference, value model and reward model are the model
each; the last two have a head of random numbers, the same for both. Each library samples --batch_size completions a
generation, and passes over them --epochs times. What counts are whole generations after the first: sampling, scoring
by the reward model, what policy, reference and value model say, and training. Needs the parity extra; TRL 1.10 is
installed into a folder of its own, for the time of the run.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Comparison, in_turn, store
from train import as_folder

TRL = "trl==1.10.0"


def shared(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What both trainers are told, in the names that they share."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch_size // args.accumulation,
        "gradient_accumulation_steps": args.accumulation,
        "num_ppo_epochs": args.epochs,
        "num_mini_batches": 1,
        "learning_rate": 1e-6,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
    }


def run_jaxpost(args: argparse.Namespace) -> list[float]:
    """Seconds of each generation."""
    import jaxpost

    with tempfile.TemporaryDirectory() as folder:
        config = jaxpost.PPOConfig(
            **shared(args, folder),
            max_steps=args.generations * args.epochs,
            max_completion_length=args.max_completion_length,
            value_model_path=args.judge,
            report_to=["none"],
        )
        rows = [{"prompt": row["prompt"]} for row in prompts(args)]
        jaxpost.PPOTrainer(config, model=args.model, train_dataset=rows, reward_model=args.judge).train()
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    times = [row["step_time"] for row in log]
    return [sum(times[i : i + args.epochs]) for i in range(0, len(times), args.epochs)]


def run_trl(args: argparse.Namespace) -> list[float]:
    """Likewise."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    ends: list[float] = []

    class Timer(TrainerCallback):
        def on_log(self, arguments: object, state: object, control: object, logs: dict, **_: object) -> None:
            if "objective/kl" in logs:
                ends.append(time.perf_counter())

    def judge() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(args.judge, num_labels=1)

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    options = {"add_generation_prompt": True, "return_dict": True}
    ids = [tokenizer.apply_chat_template(row["prompt"], **options)["input_ids"] for row in prompts(args)]
    rows = Dataset.from_list([{"input_ids": list(tokens)} for tokens in ids])
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            **shared(args, folder),
            total_episodes=args.generations * args.batch_size,
            response_length=args.max_completion_length,
            stop_token="eos",
            num_sample_generations=0,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(args.model),
            ref_model=AutoModelForCausalLM.from_pretrained(args.model),
            reward_model=judge(),
            value_model=judge(),
            train_dataset=rows,
            eval_dataset=rows.select(range(8)),
            callbacks=[Timer()],
        )
        began = time.perf_counter()
        trainer.train()
    return [end - begin for begin, end in itertools.pairwise([began, *ends])]


def prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """As many rows as are completed."""
    from jaxpost.data.rows import take
    from jaxpost.data.sources import load_rows
    from jaxpost.data.word_problems import MIN_ROWS, generate

    count = args.generations * args.batch_size
    if args.dataset is None:
        return generate(max(MIN_ROWS, count))[:count]
    return [{"prompt": cell} for cell in take(load_rows(args.dataset, "train"), count)["prompt"]]


def make_judge(model: str, folder: Path) -> str:
    """The model with a head of random numbers, for both libraries."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    judge.config.pad_token_id = tokenizer.pad_token_id
    judge.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder, hub id or .gguf file")
    parser.add_argument("--dataset", help="rows with a prompt; by default word problems")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--generations", type=int, default=3, help="the first does not count")
    parser.add_argument("--batch_size", type=int, default=64, help="completions of a generation")
    parser.add_argument("--accumulation", type=int, default=4, help="parts that a batch is trained on in")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max_completion_length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--only", choices=["jaxpost", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    if args.generations < 2 or args.batch_size % args.accumulation:
        parser.error("at least 2 generations; batch_size a multiple of accumulation")
    if args.only:
        print(json.dumps({"jaxpost": run_jaxpost, "trl": run_trl}[args.only](args)))
        return
    results: dict[str, list[list[float]]] = {"jaxpost": [], "trl": []}
    with tempfile.TemporaryDirectory() as where:
        model = as_folder(args.model, Path(where))
        judge = make_judge(model, Path(where) / "judge")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", f"{where}/trl", TRL], check=True)
        older = {"PYTHONPATH": os.pathsep.join([f"{where}/trl", str(Path(__file__).parents[2])])}
        environment = {**os.environ, **older, "TRL_EXPERIMENTAL_SILENCE": "1"}
        shared = [__file__, *sys.argv[1:], "--model", model, "--judge", judge]
        sides = {name: [*shared, "--only", name] for name in results}
        for name, run in in_turn(sides, args.rounds, env=environment):
            results[name].append(run)
            print(f"{name:8} " + " ".join(f"{seconds:.1f}" for seconds in run) + " s a generation", flush=True)
    seconds = {name: [x for run in runs for x in run[1:]] for name, runs in results.items()}
    what = f"PPO of {Path(args.model).stem}, a generation of {args.batch_size} completions, {args.epochs} epochs"
    found = Comparison(seconds, "s", less_is_better=True)
    store(args.output, what, str(found), {"runs": results, "ratios": found.ratios})


if __name__ == "__main__":
    main()
