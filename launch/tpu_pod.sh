#!/bin/bash
# A run on all hosts of a TPU pod slice: launch/tpu_pod.sh TPU_NAME ZONE gs://BUCKET/WORKDIR CONFIG [--config.field=value ...]
# The workdir lies in a bucket. Every host has the checkout in its home, with the package in the checkout's .venv:
# docs/scale.md has the commands. TFDS_DATA_DIR, where it is set here, is set there.
set -e
name=$1 zone=$2 workdir=$3 config=$4
shift 4
arguments=$(printf ' %q' --workdir="$workdir" --config="$config" "$@")
data=${TFDS_DATA_DIR:+$(printf 'TFDS_DATA_DIR=%q ' "$TFDS_DATA_DIR")}
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd transformer-lm-japanese && ${data}.venv/bin/python -m transformer_lm.main$arguments"
