"""Sums of two numbers from 1 to 9 as prompts, with their answers: the smallest thing that a model can learn by itself.

Equal seeds give equal bytes. A quarter of the sums is held out.

    python -m jaxpost.data.sums --output_dir data/sums
"""

import random
import sys
from pathlib import Path

from jaxpost.data.word_problems import main, write_files

LARGEST = 9


def generate(seed: int = 0) -> list[dict]:
    """Every sum once, `{"prompt", "answer"}` with the prompt as messages, in random order."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(seed).shuffle(pairs)
    question = "What is {} + {}? Answer with just the number."
    return [{"prompt": [{"role": "user", "content": question.format(a, b)}], "answer": str(a + b)} for a, b in pairs]


def write(output_dir: str | Path, num_rows: int = LARGEST**2, seed: int = 0) -> dict[str, int]:
    """Write `train.jsonl` and `test.jsonl` of at most `num_rows` sums together; return how many rows each has.

    Raises:
        ConfigError: `output_dir` is not a folder that can be written.
    """
    rows = generate(seed)[:num_rows]
    held_out = len(rows) // 4
    return write_files(output_dir, {"train": rows[held_out:], "test": rows[:held_out]})


if __name__ == "__main__":
    sys.exit(main(write=write))
