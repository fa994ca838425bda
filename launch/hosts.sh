#!/usr/bin/env bash
# Trains on several machines over ssh, with DeepSpeed's launcher, after a check that names everything that is wrong.
#
#   bash launch/hosts.sh [--min-hosts N] [--launcher pdsh|openmpi|mpich|impi|mvapich] HOSTFILE CONFIG [key.sub=value ...]
#
# HOSTFILE lists a machine a line, as DeepSpeed wants it: `worker-1 slots=8`. All machines need the same checkout and
# environment at the same path, ssh without a password from here, and a run.dir on a file system that they share.
#
# --min-hosts N  go on with fewer machines when some are out of reach: on the largest number of ranks that shares the
#                same global batch evenly. With launch/supervise.sh around it a run survives the loss of a machine.
# SSH_ARGS       options for ssh, such as `-p 2222 -i key`, or `-F file`
# MASTER_PORT    a port that is free on the first machine (default 29500);  MASTER_ADDR  its address, found when unset
#
# Exit codes as launch/local.sh; nothing is started when the check fails (2, or 1 when machines were out of reach).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

min_hosts=() launcher=pdsh
while [ $# -gt 0 ]; do
    case $1 in
        --min-hosts) min_hosts=(--min-hosts "${2:-}"); shift 2 || fail "--min-hosts: give a number" ;;
        --launcher) launcher=${2:-}; shift 2 || fail "--launcher: give its name" ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "unknown option $1; see $0 --help" ;;
        *) break ;;
    esac
done
[ $# -ge 2 ] || fail "give a hostfile and a config; see $0 --help"
hostfile=$1
shift
[ "$launcher" != pdsh ] || command -v pdsh >/dev/null || fail "pdsh is not installed; on Debian or Ubuntu: sudo apt-get install pdsh"
port=${MASTER_PORT:-29500}
begin_run "$@"
[ -n "${DS_ACCELERATOR:-}" ] || [ "$(num_accelerators)" -gt 0 ] || export DS_ACCELERATOR=cpu

# The overrides go into a file of their own: pdsh would hand them to another shell, which expands braces and globs.
config=$RUN_DIR/launch/config.yaml
python "$MMSCALE_ROOT/launch/status.py" resolve "$config" "$@"
SSH_ARGS=${SSH_ARGS:-} python "$MMSCALE_ROOT/launch/preflight.py" "$hostfile" "$config" --run-dir "$RUN_DIR" --port "$port" \
    "${min_hosts[@]}" || exit $?

address=${MASTER_ADDR:-}
# shellcheck source=/dev/null
source "$RUN_DIR/launch/variables"
# Machines may differ in cores, but not in OMP_NUM_THREADS: they are expected to be alike.
training_environment "$RANKS_A_HOST"
if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}; fi
# DeepSpeed hands the variables in this file to the other machines.
DS_ENV_FILE=$RUN_DIR/launch/environment
export DS_ENV_FILE
export_environment >"$DS_ENV_FILE"
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} ${SSH_ARGS:-}"
run_launcher deepspeed --hostfile "$RUN_DIR/launch/hosts" --no_ssh_check --force_multi --launcher "$launcher" \
    --master_addr "${address:-$MASTER_ADDR}" --master_port "$port" --module mmscale train "$config"
outcome_of_run "$LAUNCHER_CODE"
