#!/usr/bin/env bash
# Run the tests in .venv, which is made on first use.
#   bash tools/test.sh            against stored numbers; needs only Python >= 3.11 and the package index
#   bash tools/test.sh --parity   also against torch, transformers, trl and peft, live
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

if [ "${1:-}" = "--parity" ]; then
  shift
  environment .venv test,parity,tpu  # tpu: to compile for TPUs, which needs none
  exec .venv/bin/python -m pytest -n 2 -m "not slow and not gpu" "$@"
fi
environment .venv test
exec .venv/bin/python -m pytest -n 2 "$@"
