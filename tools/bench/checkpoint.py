"""What checkpoints cost: the same run with a checkpoint in the middle and without one, alternating.

    python -m jaxpost.data.word_problems --output_dir problems
    python tools/bench/checkpoint.py --model MODEL --dataset problems [--rounds 2] [--steps 20] [--save_steps 50]

The run is that of configs/sft_quickstart.yaml, full fine-tuning with AdamW. Counted is the time from the end of step 2
to the end of the last one, by which the checkpoint, begun at step 4, must be on disk: copying it to the host, which
steps wait for, and writing it while steps go on. Prints the seconds that one costs, and that as a share of the time of
--save_steps steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from measure import store

from jaxpost import SFTConfig, SFTTrainer
from jaxpost.cli import parse
from jaxpost.train.logging import RunLog
from jaxpost.train.manifest import MANIFEST

CONFIG = Path(__file__).parent.parent.parent / "configs" / "sft_quickstart.yaml"
SAVED, WARM = 4, 2


def timed(args: argparse.Namespace, *, saves: bool) -> float:
    """Seconds from the end of step WARM to the end of the last step."""
    ends: dict[int, float] = {}

    def log(self: RunLog, step: int, metrics: dict[str, float]) -> None:
        ends[step] = time.perf_counter()

    RunLog.log = log
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        told = {
            **{"model_name_or_path": args.model, "dataset_name": args.dataset, "output_dir": folder},
            **{"max_steps": args.steps, "logging_steps": 1, "eval_strategy": "no", "report_to": "none"},
            **{"save_strategy": "steps" if saves else "no", "save_steps": SAVED},
            **{"lr_scheduler_type": "constant", "eval_on_start": "false"},
        }
        words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
        trainer = SFTTrainer(args=parse(SFTConfig, "sft", ["--config", str(CONFIG), *words]))
        real, once = trainer._schedule, {SAVED} if saves else set()

        def schedule(total: int):
            planned = real(total)
            object.__setattr__(planned, "saves", lambda step: step in once)
            return planned

        trainer._schedule = schedule
        trainer.train()
        assert not saves or (Path(folder) / "checkpoints" / str(SAVED) / MANIFEST).exists()
    return ends[args.steps] - ends[WARM]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--folder", help="where the run writes; by default the system's folder for temporary files")
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    costs, steps = [], []
    for number in range(args.rounds):
        without, with_one = timed(args, saves=False), timed(args, saves=True)
        steps.append(without / (args.steps - WARM))
        costs.append(with_one - without)
        print(f"round {number + 1}: a step {steps[-1]:.3f} s, a checkpoint {costs[-1]:.2f} s", flush=True)
    cost, step = statistics.median(costs), statistics.median(steps)
    what = f"A checkpoint of {Path(args.model).stem} with AdamW"
    figure = f"{cost:.2f} s, {cost / (args.save_steps * step):.2%} of {args.save_steps} steps of {step:.2f} s"
    store(args.output, what, figure, {"costs": costs, "steps": steps})


if __name__ == "__main__":
    main()
