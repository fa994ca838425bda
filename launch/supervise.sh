#!/usr/bin/env bash
# Runs a launch script and, when the training fails, starts it again from its last checkpoint.
#
#   bash launch/supervise.sh [--retries N] [--backoff SECONDS] -- LAUNCHER ARGUMENTS...
#   bash launch/supervise.sh -- bash launch/local.sh configs/toy.yaml train.samples=1000000
#   bash launch/supervise.sh --retries 20 -- bash launch/hosts.sh --min-hosts 2 hostfile configs/coca_b32.yaml
#
# --retries N        restarts before giving up (default 5); a failure further on than the one before starts anew at 0
# --backoff SECONDS  pause before the first restart, doubled each time up to 10 minutes (default 10)
#
# Not restarted: a finished run (0), a preempted one (75: somebody wanted it to stop), bad input (2), and an error that
# comes back at the same position of the stream, which a restart would only meet again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

retries=5 backoff=10
while [ $# -gt 0 ]; do
    case $1 in
        --retries) retries=${2:-}; shift 2 || fail "--retries: give a number" ;;
        --backoff) backoff=${2:-}; shift 2 || fail "--backoff: give seconds" ;;
        --) shift; break ;;
        -h | --help) usage; exit 0 ;;
        *) fail "$1: put -- before the launcher; see $0 --help" ;;
    esac
done
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries $retries: give a whole number"
[[ $backoff =~ ^[0-9]+$ ]] || fail "--backoff $backoff: give whole seconds"
[ $# -gt 0 ] || fail "no launcher given; see $0 --help"

# The launch script writes its run.dir here, since only it reads the config.
MMSCALE_RUN_DIR_FILE=$(mktemp)
export MMSCALE_RUN_DIR_FILE
trap 'rm -f "$MMSCALE_RUN_DIR_FILE"' EXIT
# Signals go to the launch script, which ends its ranks with a checkpoint; a run that was asked to stop stays stopped.
child=0 asked=0 interrupted=0
trap 'asked=1 interrupted=1; [ "$child" -eq 0 ] || kill -TERM "$child" 2>/dev/null || true' TERM INT

failures=0 last_position=none last_samples=-1 pause=$backoff
while true; do
    started=$(date +%s.%N)
    "$@" &
    child=$!
    while true; do # a signal interrupts `wait`, which then gives the signal's code and not the launch script's
        interrupted=0 code=0
        wait "$child" || code=$?
        [ "$interrupted" -eq 1 ] || break
    done
    child=0
    case $code in 0 | 2 | 75) exit "$code" ;; esac
    [ "$asked" -eq 0 ] || exit "$code"

    run_dir=$(cat "$MMSCALE_RUN_DIR_FILE")
    position=unknown
    [ -z "$run_dir" ] || position=$(python "$MMSCALE_ROOT/launch/status.py" position "$run_dir" --since "$started")
    if [ "$position" != unknown ]; then
        if [ "$position" = "$last_position" ]; then
            echo "supervise: given up: it failed twice at the same position: $position" >&2
            exit 1
        fi
        samples=${position%% *}
        if [ "$samples" -gt "$last_samples" ]; then failures=0 pause=$backoff; fi
        last_position=$position last_samples=$samples
    fi
    failures=$((failures + 1))
    if [ "$failures" -gt "$retries" ]; then
        echo "supervise: given up after $retries restarts ($position)" >&2
        exit 1
    fi
    echo "supervise: failed ($position); restart $failures of $retries in $pause s" >&2
    sleep "$pause" &
    child=$!
    wait "$child" || true
    child=0
    [ "$asked" -eq 0 ] || exit 1
    pause=$((pause * 2 > 600 ? 600 : pause * 2))
done
