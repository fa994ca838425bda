#!/usr/bin/env bash
# Trains on this machine: one process a GPU, or NPROC processes on the CPU (default 1).
#
#   [NPROC=2] bash launch/local.sh CONFIG [key.sub=value ...]
#
# MASTER_PORT is where the ranks meet (default: a free one, so that several runs share a machine).
#
# Ends with 0 when the run is finished, 75 when it was preempted and saved, 2 for bad input, 1 otherwise.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

case ${1:---help} in -h | --help) usage; exit 0 ;; esac
begin_run "$@"
gpus=$(num_accelerators)
[ "$gpus" -gt 0 ] && ranks=${NPROC:-$gpus} || ranks=${NPROC:-1}
training_environment "$ranks"
run_launcher deepspeed --num_accelerators "$ranks" --master_port "${MASTER_PORT:-$(free_port)}" --module mmscale train "$@"
outcome_of_run "$LAUNCHER_CODE"
