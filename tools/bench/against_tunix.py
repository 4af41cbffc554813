"""Training on this machine: jaxpost against Tunix, alternating, same model, same rows in the same order, both float32.

    python -m venv tunix && tunix/bin/pip install google-tunix
    python tools/bench/against_tunix.py --tunix tunix/bin/python --model MODEL --dataset ROWS.jsonl [--dense 256]
    python tools/bench/against_tunix.py --tunix tunix/bin/python --model MODEL --dataset PROMPTS.jsonl --method grpo

The model is a Llama. Each round starts a fresh process for either, which trains with its own trainer as its examples
do, without recomputing activations; steps count from WARM on. sft: all tokens are trained on. Tunix is given rows
padded to the longest of all of them, since its trainer takes batches of one shape, jaxpost the rows. --dense N takes
the same tokens in rows of N, and nothing is padded. tokens/s counts real tokens. grpo: 8 completions of a prompt, of at
most --max_completion_length tokens, rewarded where the last number is the answer; each library learns from what it
samples itself, and completions/s are compared: they are as long as the model makes them. Tunix samples all of a step at
once and accumulates gradients over its prompts: training on 64 word problems at once takes it more than 24 GB.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import Comparison, in_turn, store
from train import GROUP, WARM, as_folder

RATE = 1e-6


def make_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of sft `input_ids`, of grpo the text of the prompt and its answer."""
    from jaxpost.data.rows import take
    from jaxpost.data.sources import load_rows
    from jaxpost.models.pretrained import open_source

    tokenizer, rows = open_source(args.model).tokenizer(), load_rows(args.dataset, "train")
    if args.method == "grpo":
        rows = take(rows, args.steps * args.batch_size // GROUP)
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in rows["prompt"]]
        return [{"prompt": text, "answer": answer} for text, answer in zip(texts, rows["answer"], strict=True)]
    count = args.steps * args.batch_size
    rows = take(rows, count)
    chats = [[*prompt, *completion] for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]
    ids = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]
    if args.dense:
        tokens = np.concatenate(ids)
        ids = np.resize(tokens, (count, args.dense)).tolist()
    return [{"input_ids": row} for row in ids]


def run_jaxpost(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, float]:
    import jaxpost
    from jaxpost.rl.builtin_rewards import numeric_answer

    with tempfile.TemporaryDirectory() as folder:
        told = {
            "output_dir": folder,
            "max_steps": args.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": ["none"],
            "learning_rate": RATE,
            "per_device_train_batch_size": args.batch_size,
            "gradient_checkpointing": False,
        }
        if args.method == "grpo":
            sampling = {"num_generations": GROUP, "max_completion_length": args.max_completion_length, "beta": 0.0}
            config = jaxpost.GRPOConfig(**told, **sampling, shuffle_dataset=False)
            trainer = jaxpost.GRPOTrainer(args.model, args=config, train_dataset=rows, reward_funcs=numeric_answer)
        else:
            order = {"train_sampling_strategy": "sequential", "length_buckets": args.length_buckets}
            trainer = jaxpost.SFTTrainer(args.model, args=jaxpost.SFTConfig(**told, **order), train_dataset=rows)
        trainer.train()
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": sum(row["step_time"] for row in log[WARM:]), "loss": log[0]["loss"]}


def run_tunix(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import optax
    from tunix.models.llama3 import params
    from tunix.models.llama3.model import ModelConfig

    told = json.loads((Path(args.model) / "config.json").read_text())
    config = ModelConfig(
        num_layers=told["num_hidden_layers"],
        vocab_size=told["vocab_size"],
        embed_dim=told["hidden_size"],
        hidden_dim=told["intermediate_size"],
        num_heads=told["num_attention_heads"],
        head_dim=told["hidden_size"] // told["num_attention_heads"],
        num_kv_heads=told["num_key_value_heads"],
        rope_theta=told["rope_theta"],
        norm_eps=told["rms_norm_eps"],
        weight_tying=told["tie_word_embeddings"],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.0))
    model = params.create_model_from_safe_tensors(args.model, config, mesh, jnp.float32)
    train = {"sft": tunix_sft, "grpo": tunix_grpo}[args.method]
    with mesh:
        return train(args, rows, model, optimizer, mesh)


def tunix_sft(args: argparse.Namespace, rows: list[dict[str, Any]], model: Any, optimizer: Any, _: Any) -> Any:
    import jax.numpy as jnp
    from tunix.sft import utils
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    losses = []

    def inputs(batch: Any) -> dict[str, Any]:
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(batch.input_mask),
            "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
        }

    width = max(len(row["input_ids"]) for row in rows)
    ids = np.array([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows], np.int32)
    real = np.arange(width) < np.array([[len(row["input_ids"])] for row in rows])
    batches = [
        TrainingInput(input_tokens=jnp.asarray(tokens), input_mask=jnp.asarray(mask))
        for tokens, mask in zip(np.split(ids, args.steps), np.split(real, args.steps), strict=True)
    ]
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**6)).with_gen_model_input_fn(inputs)
    trainer.is_managed_externally = True  # or it closes itself after the first call
    written = trainer._write_metrics
    trainer._write_metrics = lambda buffer: (losses.append(float(buffer.loss)), written(buffer))
    trainer.train(batches[:WARM])
    began = time.perf_counter()
    trainer.train(batches[WARM:])
    return {"seconds": time.perf_counter() - began, "loss": losses[0]}


def tunix_grpo(args: argparse.Namespace, rows: list[dict[str, Any]], model: Any, optimizer: Any, mesh: Any) -> Any:
    from transformers import AutoTokenizer
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    from jaxpost.rl.builtin_rewards import numeric_answer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = args.batch_size // GROUP
    longest = max(len(tokenizer.encode(row["prompt"])) for row in rows)
    began = []

    def reward(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        return numeric_answer(prompts=list(prompts), completions=list(completions), answer=[str(a) for a in answer])

    def batches() -> Any:
        for step in range(args.steps):
            began.append(time.perf_counter())
            part = rows[step * prompts : (step + 1) * prompts]
            yield {name: np.array([row[name] for row in part]) for name in ("prompt", "answer")} | {
                "prompts": np.array([row["prompt"] for row in part])
            }

    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=10**6,
        max_steps=args.steps,
        mini_batch_size=prompts,
        train_micro_batch_size=1,
        rollout_micro_batch_size=prompts,  # by default as many as are trained on at once
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=args.max_completion_length,
        max_prompt_length=longest,
        kv_cache_size=longest + args.max_completion_length + 8,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[tokenizer.eos_token_id],
    )
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
        ),
    )
    config = GRPOConfig(num_generations=GROUP, num_iterations=1, beta=0.0, epsilon=0.2)
    GRPOLearner(cluster, config, reward_fns=reward).train(batches())
    ended = time.perf_counter()
    assert len(began) == args.steps
    return {"seconds": ended - began[WARM]}


def compare(args: argparse.Namespace) -> None:
    """Both in turn; prints a line a run, then medians and their ratio."""
    runs: dict[str, list[dict[str, float]]] = {"jaxpost": [], "tunix": []}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory() as where:
        model = as_folder(args.model, Path(where))
        rows, file = make_rows(args), Path(where) / "rows.json"
        file.write_text(json.dumps(rows))
        counted = rows[len(rows) * WARM // args.steps :]
        what, amount = "completions", (args.steps - WARM) * args.batch_size
        if args.method == "sft":
            what, amount = "tokens", sum(len(row["input_ids"]) for row in counted)
        command = [__file__, *sys.argv[1:], "--model", model, "--rows", str(file), "--only"]
        sides = {name: [*command, name] for name in runs}
        for name, run in in_turn(sides, args.rounds, {"tunix": args.tunix}, env=environment):
            runs[name].append(run)
            print(f"{name:8} {amount / run['seconds']:7.2f} {what}/s, {run}", flush=True)
    speeds = {name: [amount / run["seconds"] for run in each] for name, each in runs.items()}
    found = Comparison(speeds, f"{what}/s")
    store(args.output, title(args), str(found), {"runs": runs, "ratios": found.ratios})


def title(args: argparse.Namespace) -> str:
    """What is measured, of which model and rows."""
    model = Path(args.model).stem
    if args.method == "grpo":
        return f"GRPO of {model}, {args.batch_size} completions a step, at most {args.max_completion_length} tokens"
    rows = f"rows of {args.dense} tokens" if args.dense else f"rows of {Path(args.dataset).name}"
    return f"SFT of {model}, batch {args.batch_size}, {rows}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama, or a .gguf file of one")
    parser.add_argument("--dataset", required=True, help="rows of prompt and completion, or of prompt and answer")
    parser.add_argument("--tunix", required=True, help="Python of an environment with google-tunix")
    parser.add_argument("--method", default="sft", choices=["sft", "grpo"])
    parser.add_argument("--dense", type=int, default=0, help="length of all rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4, help="of grpo, completions")
    parser.add_argument("--length_buckets", type=int, default=4)
    parser.add_argument("--max_completion_length", type=int, default=64)
    parser.add_argument("--only", choices=["jaxpost", "tunix"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    if args.only:
        rows = json.loads(Path(args.rows).read_text())
        print(json.dumps({"jaxpost": run_jaxpost, "tunix": run_tunix}[args.only](args, rows)))
        return
    if args.steps <= WARM or (args.method == "grpo" and args.batch_size % GROUP):
        parser.error(f"more than {WARM} steps; with grpo, batch_size a multiple of {GROUP}")
    compare(args)


if __name__ == "__main__":
    main()
