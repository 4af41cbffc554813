"""Damaged files that a run is configured by and trained on: read, or refused in jaxpost's own words, and soon."""

import json
import random
from collections import Counter

import pytest

from jaxpost.cli import parse
from jaxpost.data.chat import encode_rows
from jaxpost.data.sources import load_rows
from jaxpost.errors import JaxpostError
from jaxpost.methods import METHODS
from tests.models.test_mutations import MUTANTS, mutate
from tests.soon import soon

YAML = """\
# a run
model_name_or_path: models/tiny
dataset_name: "data"
learning_rate: 1e-5
max_steps: 100
warmup_steps: 0.1
loss_type: [sigmoid, sft]
loss_weights:
  - 1.0
  - 0.5
report_to: []
use_peft: true
packing: no
phase_timeouts: {train: 60}
"""


def outcomes(attempt, path, content, kinds=(2, 3)):
    """How many mutants are read and how many refused; any other error, and one that takes long, fails the test."""
    counts = Counter()
    for seed in range(MUTANTS):
        mutant = mutate(content, random.Random(seed))
        path.write_bytes(mutant)
        told = f"mutant {seed}: {mutant[:2000]!r}"
        try:
            with soon(told):
                attempt(path)
            counts["read"] += 1
        except JaxpostError as error:
            counts["refused"] += 1
            assert error.exit_code in kinds and "\n" not in str(error) and len(str(error)) < 1000, (seed, str(error))
        except Exception as error:
            raise AssertionError(told) from error
    return counts


def test_mutants_of_a_config_file_are_read_or_refused(tmp_path):
    path = tmp_path / "run.yaml"
    counts = outcomes(lambda file: parse(METHODS["dpo"].config, "dpo", ["--config", str(file)]), path, YAML.encode())
    assert counts["read"] > 20 and counts["refused"] > 500, counts


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_mutants_of_a_data_file_are_read_or_refused(tmp_path, tokenizer, kind):
    rows = [{"text": f"row {n} é \U0001f600"} for n in range(4)]
    if kind == "messages":
        rows = [
            {"prompt": [{"role": "user", "content": f"q {n}"}], "completion": [{"role": "assistant", "content": "a"}]}
            for n in range(4)
        ]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    config = METHODS["sft"].config()

    def attempt(file):
        rows = load_rows(str(file), "train")
        assert list(encode_rows(rows, tokenizer, config, vocab_size=320, name=rows.name))

    counts = outcomes(attempt, tmp_path / "rows.jsonl", content)
    assert counts["read"] > 20 and counts["refused"] > 500, counts
