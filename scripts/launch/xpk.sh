#!/usr/bin/env bash
# A run on a GKE cluster of TPU slices, by XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=my-cluster ZONE=us-east5-b IMAGE=$MY_IMAGE scripts/launch/xpk.sh my-run v6e-64 -- \
#       dllm-jax adapt configs/adapt_smollm2.py:tpu --run /tmp/run --data /data --checkpoints gs://B/run
#
# Settings by variables: CLUSTER; ZONE; PROJECT; IMAGE, which holds this tree at /app, installed with
# the extras `tpu` and `gcs`; SLICES (1); RESTARTS (10): a killed host restarts all of them, and the run goes on
# from its last checkpoint. jax.distributed finds the slices by what GKE sets.
set -euo pipefail

[ $# -ge 3 ] || { sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
name=$1 type=$2
shift 2
[ "$1" = -- ] && shift
: "${CLUSTER:?set CLUSTER to the name of the cluster}" "${ZONE:?set ZONE}" "${IMAGE:?set IMAGE}"

exec xpk workload create --cluster "$CLUSTER" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} \
    --workload "$name" --tpu-type "$type" --num-slices "${SLICES:-1}" \
    --docker-image "$IMAGE" --max-restarts "${RESTARTS:-10}" \
    --command "cd /app && exec $(printf '%q ' "$@")"
