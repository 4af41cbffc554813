#!/usr/bin/env bash
# Run jaxpost on all hosts of a Cloud TPU slice, and go on when it was told to stop (exit code 75) and is back.
#   bash configs/tpu/launch.sh NAME ZONE sft --config run.yaml --checkpoint_dir gs://BUCKET/run
# Once before: gcloud compute tpus tpu-vm scp --recurse . NAME:jaxpost --zone ZONE --worker all, and on each host
# pip install './jaxpost[tpu]' (gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all --command "pip install ...").
# The hosts find each other; each reads its own rows, and the first one writes --output_dir.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: launch.sh NAME ZONE METHOD [FLAGS]" >&2; exit 2; }
name=$1 zone=$2
shift 2
flags=$(printf '%q ' "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all \
  --command "cd jaxpost && until jaxpost $flags; do code=\$?; [ \$code = 75 ] || exit \$code; done"
