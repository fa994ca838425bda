# Sourced by the launchers: where mmscale is, the environment of training, and how a run ended.
#
# shellcheck shell=bash
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# The environment that the quickstart makes, where there is one; else whatever is on PATH.
if [ -x "$MMSCALE_VENV/bin/mmscale" ]; then
    PATH=$MMSCALE_VENV/bin:$PATH
    export PATH
fi
command -v mmscale >/dev/null || fail "mmscale is not installed: make the environment with launch/quickstart.sh, or activate yours"

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# training_environment RANKS_ON_THIS_MACHINE: the one place where the environment of training is set. What is set
# already is kept. Variables named in MMSCALE_EXPORTS travel to other machines with the launchers that need it; keys and
# passwords do not, since they would show in process lists: leave them in ~/.netrc or ~/.aws of each machine.
MMSCALE_EXPORTS="OMP_NUM_THREADS DS_ACCELERATOR TOKENIZERS_PARALLELISM TORCH_NCCL_ASYNC_ERROR_HANDLING NCCL_DEBUG
    NCCL_SOCKET_IFNAME NCCL_IB_HCA GLOO_SOCKET_IFNAME PYTORCH_CUDA_ALLOC_CONF THP_MEM_ALLOC_ENABLE MMSCALE_VENV"
training_environment() {
    local ranks=$1
    # Each rank computes with its share of the cores. Without this PyTorch starts one thread a core in every rank.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
    # A rank that fails takes the others out of their collectives, instead of leaving them waiting for ever.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Captions and patches vary in number, and freed blocks of many sizes would fragment the GPU's memory.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    # Huge pages: the loader's buffers gain from them (a root may set transparent_hugepage to madvise or always).
    export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1}
    [ -n "${DS_ACCELERATOR:-}" ] || [ "$(num_accelerators)" -gt 0 ] || export DS_ACCELERATOR=cpu
}

# export_environment: those variables that are set, one `NAME=value` a line.
export_environment() {
    local name
    for name in $MMSCALE_EXPORTS; do
        [ -z "${!name:-}" ] || echo "$name=${!name}"
    done
}

# use_route_to ADDRESS: gloo otherwise listens where the host's own name points to, which on Debian and Ubuntu is the
# loopback address 127.0.1.1, out of reach of other machines. No way there ends the script with 1: there may be one later.
use_route_to() {
    GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$(python "$MMSCALE_ROOT/launch/route.py" "$1")} || exit 1
    export GLOO_SOCKET_IFNAME
}

# free_port: a port of this machine that nobody listens on.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# begin_run CONFIG [OVERRIDES]: sets RUN_DIR and STARTED; a bad config ends the script here with code 2.
begin_run() {
    RUN_DIR=$(python "$MMSCALE_ROOT/launch/status.py" prepare "$@") || exit $?
    STARTED=$(date +%s.%N)
    rm -f "$RUN_DIR/STOP"                                                     # left by a run that was killed
    [ -z "${MMSCALE_RUN_DIR_FILE:-}" ] || echo "$RUN_DIR" >"$MMSCALE_RUN_DIR_FILE" # for launch/supervise.sh
}

# run_launcher COMMAND...: runs a launcher in a session of its own, where no signal for this script reaches it, and sets
# LAUNCHER_CODE. Launchers kill their ranks when they are signalled; here SIGTERM and SIGINT (Ctrl-C) become
# run.dir/STOP instead, with which all ranks, on all machines, save and leave together. A second one is meant.
# shellcheck disable=SC2034 # the caller reads LAUNCHER_CODE
run_launcher() {
    setsid "$@" &
    local launcher=$! asked=0 interrupted=0
    trap '_stop_launcher' TERM INT
    while true; do # a signal interrupts `wait`, which then gives the signal's code and not the launcher's
        interrupted=0 LAUNCHER_CODE=0
        wait "$launcher" || LAUNCHER_CODE=$?
        [ "$interrupted" -eq 1 ] || break
    done
    trap - TERM INT
}

_stop_launcher() {
    interrupted=1 asked=$((asked + 1))
    if [ "$asked" -eq 1 ]; then
        echo "asked to stop: the ranks save and leave; once more to kill them" >&2
        touch "$RUN_DIR/STOP"
    else
        kill -TERM -- "-$launcher" 2>/dev/null || true
    fi
}

# outcome_of_run LAUNCHER_CODE: prints and returns what run.dir/status.json says, since launchers hide exit codes:
# 0 finished, 75 preempted (saved; the same command goes on), 2 refused, 1 anything else.
outcome_of_run() {
    python "$MMSCALE_ROOT/launch/status.py" outcome "$RUN_DIR" --since "$STARTED" --launcher-code "$1"
}
