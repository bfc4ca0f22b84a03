#!/bin/bash
# A Cloud TPU slice of several hosts by a queued resource:
#   PROJECT=... ZONE=... NFS=10.0.0.2:/results examples/clusters/cloud_tpu.sh meta-llama/Llama-3.1-8B DATASET
# Commands are shown instead of run with DRY_RUN=1.
set -euo pipefail

MODEL=$1
DATASET=$2
NAME=${NAME:-jhessians}
TOPOLOGY=${TOPOLOGY:-v5litepod-16}
PLACE=(--project "${PROJECT:?}" --zone "${ZONE:?}")
SHARED=/mnt/results

run() {
  if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}

run gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${PLACE[@]}" \
  --accelerator-type "$TOPOLOGY" --runtime-version v2-alpha-tpuv5-lite \
  --valid-until-duration 24h --spot

until [[ -n ${DRY_RUN:-} ]] || gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
  --format 'value(state.state)' | grep -q ACTIVE; do
  sleep 30
done

# On all workers at once, which find each other through Cloud TPU's metadata. Results lie on a
# share (Filestore) that every worker mounts, since all of them save the run's state there.
on_all() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker all --command "$1"
}
on_all "pip install 'jhessians[tpu]' && sudo mkdir -p $SHARED && sudo mount ${NFS:?} $SHARED"
on_all "jhessians compute $SHARED/run --model '$MODEL' --dataset '$DATASET' --fsdp --resume"

run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
