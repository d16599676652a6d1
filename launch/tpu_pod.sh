#!/bin/bash
# A run on all hosts of a TPU pod slice: launch/tpu_pod.sh TPU_NAME ZONE gs://BUCKET/WORKDIR CONFIG [--config.field=value ...]
# The workdir lies in a bucket. The package is installed on every host before, with the extras tpu and gcs.
set -e
name=$1 zone=$2 workdir=$3 config=$4
shift 4
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="python3 -m transformer_lm.main --workdir='$workdir' --config='$config' $*"
