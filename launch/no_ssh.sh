#!/usr/bin/env bash
# Trains on several machines that cannot reach each other by ssh: run the same command on each of them.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [NPROC=8] bash launch/no_ssh.sh CONFIG [key.sub=value ...]
#
# NODES        number of machines;  NODE_RANK  this one's number, from 0
# MASTER_ADDR  address of machine 0, as the others see it;  MASTER_PORT  a free port there (default 29500)
# NPROC        processes on each machine (default: one a GPU, or 1)
# LAUNCHER     deepspeed (default) or torchrun: the same training
#
# run.dir has to be on a file system that all machines share. Exit codes as launch/local.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

case ${1:---help} in -h | --help) usage; exit 0 ;; esac
for name in NODES NODE_RANK MASTER_ADDR; do
    [ -n "${!name:-}" ] || fail "$name is not set; see $0 --help"
done
[[ $NODES =~ ^[0-9]+$ && $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $NODES ]] ||
    fail "NODES=$NODES NODE_RANK=$NODE_RANK: give numbers, the second from 0 up to below the first"
begin_run "$@"
gpus=$(num_accelerators)
[ "$gpus" -gt 0 ] && ranks=${NPROC:-$gpus} || ranks=${NPROC:-1}
training_environment "$ranks"
use_route_to "$MASTER_ADDR"
case ${LAUNCHER:-deepspeed} in
    deepspeed)
        # DeepSpeed takes the machines' number and slots from a hostfile; only their number matters here.
        hostfile=$(mktemp)
        trap 'rm -f "$hostfile"' EXIT
        for ((node = 0; node < NODES; node++)); do echo "node$node slots=$ranks" >>"$hostfile"; done
        run_launcher deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" \
            --master_port "${MASTER_PORT:-29500}" --module mmscale train "$@"
        rm -f "$hostfile"
        ;;
    torchrun)
        run_launcher torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$ranks" --master_addr "$MASTER_ADDR" \
            --master_port "${MASTER_PORT:-29500}" --module mmscale train "$@"
        ;;
    *) fail "LAUNCHER=$LAUNCHER: choose deepspeed or torchrun" ;;
esac
outcome_of_run "$LAUNCHER_CODE"
