#!/usr/bin/env bash
# A run on all hosts of a TPU pod slice, by gcloud.
#
#   ZONE=us-east5-b scripts/launch/tpu_vm.sh create my-pod v6e-64     # add QUEUED=1 to wait in line
#   ZONE=us-east5-b scripts/launch/tpu_vm.sh setup my-pod             # copies and installs this tree
#   ZONE=us-east5-b scripts/launch/tpu_vm.sh run my-pod -- \
#       dllm-jax adapt configs/adapt_smollm2.py:tpu --run /tmp/run --data /tmp/data --checkpoints gs://B/run
#   ZONE=us-east5-b scripts/launch/tpu_vm.sh stop my-pod              # saves and stops
#   ZONE=us-east5-b scripts/launch/tpu_vm.sh delete my-pod
#
# Settings by variables: ZONE; PROJECT; VERSION of the TPU runtime; SPOT=1; QUEUED=1.
# jax.distributed finds the pod by the metadata of its VMs. Hosts share no disk: checkpoints go to a
# bucket, the metrics stay on worker 0, and each host needs the data at the same path.
set -euo pipefail

usage() { sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
[ $# -ge 2 ] || usage
action=$1 name=$2
shift 2
: "${ZONE:?set ZONE to the zone of the TPU}"
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
spot=(${SPOT:+--spot})
tpu=(gcloud compute tpus tpu-vm)

everywhere() { "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command "$1"; }

case $action in
create)
    [ $# -eq 1 ] || usage
    version=${VERSION:-v2-alpha-tpuv6e}
    if [ -n "${QUEUED:-}" ]; then
        exec gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" \
            --accelerator-type "$1" --runtime-version "$version" "${spot[@]}"
    fi
    exec "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type "$1" --version "$version" \
        "${spot[@]}"
    ;;
setup)
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz -o "$archive" HEAD
    "${tpu[@]}" scp "$archive" "$name:dllm_jax.tar.gz" "${where[@]}" --worker=all
    everywhere 'mkdir -p dllm_jax && tar -xzf dllm_jax.tar.gz -C dllm_jax && cd dllm_jax &&
        python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[tpu,gcs]"'
    ;;
run)
    [ "${1:-}" = -- ] && shift
    [ $# -ge 1 ] || usage
    everywhere "cd dllm_jax && echo \$\$ > run.pid && PATH=\$PWD/.venv/bin:\$PATH exec $(printf '%q ' "$@")"
    ;;
stop) everywhere 'kill -TERM "$(cat dllm_jax/run.pid)"' ;;
delete)
    if [ -n "${QUEUED:-}" ]; then
        exec gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
    fi
    exec "${tpu[@]}" delete "$name" "${where[@]}"
    ;;
*) usage ;;
esac
