"""What one waits for before a run trains: the command line, the imports, and the first step, cold and from the cache.

    python -m jaxpost.data.word_problems --output_dir problems
    python tools/bench/startup.py --model MODEL --dataset problems [--rounds 3] [--config configs/sft_quickstart.yaml]

`first` is a run whose cache of compiled programs and store of tokenised rows are empty, `again` the same command with
what that one left: seconds from the start of the process to the end of the first step, which is when it is logged; and
without those that a step itself takes, which are taken to be those of the second one. Every round begins with empty
caches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import store

STEPS = 2


def seconds(command: list[str]) -> float:
    """Of a process, from beginning to end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(args: argparse.Namespace, folder: Path, name: str) -> dict[str, float]:
    """Seconds from the start of a run's process to its first logged step, with and without those of a step."""
    out = folder / name
    told = {
        **{"model_name_or_path": args.model, "dataset_name": args.dataset, "output_dir": str(out)},
        **{"max_steps": str(STEPS), "logging_steps": "1", "eval_strategy": "no", "eval_on_start": "false"},
        **{"save_strategy": "no", "report_to": "none", "seed": "0"},
        **{"compilation_cache_dir": str(folder / "xla"), "tokenized_cache_dir": str(folder / "tokenized")},
    }
    words = [word for flag, value in told.items() for word in (f"--{flag}", value)]
    command = [sys.executable, "-m", "jaxpost", args.method, "--config", args.config, *words]
    log, began = out / "metrics.jsonl", time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        while not (log.exists() and log.read_text().count("\n")):
            if run.poll():
                raise SystemExit(run.stderr.read())
            time.sleep(0.02)
        ended = time.perf_counter() - began
        run.communicate()
    step = json.loads(log.read_text().splitlines()[1])["step_time"]
    return {name: ended, f"{name}, less the step": ended - step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id or .gguf file")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--method", default="sft")
    parser.add_argument("--config", default=str(Path(__file__).parents[2] / "configs" / "sft_quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    runs = []
    seconds(["-m", "jaxpost", "--help"])  # writes bytecode and reads pages; not counted
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            found = {
                "jaxpost --help": seconds(["-m", "jaxpost", "--help"]),
                "import jaxpost": seconds(["-c", "import jaxpost"]),
                **first_step(args, Path(folder), "first"),
                **first_step(args, Path(folder), "again"),
            }
        runs.append(found)
        print(", ".join(f"{what} {value:.2f} s" for what, value in found.items()), flush=True)
    medians = {what: statistics.median(run[what] for run in runs) for what in runs[0]}
    figure = ", ".join(f"{what} {value:.2f} s" for what, value in medians.items())
    share = medians["again, less the step"] / medians["first, less the step"]
    store(args.output, "Starting a run", f"{figure}: again in {share:.0%}", {"runs": runs, "medians": medians})


if __name__ == "__main__":
    main()
