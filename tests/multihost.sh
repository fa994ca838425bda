#!/usr/bin/env bash
# launch/hosts.sh on two real hosts that this machine plays: two network namespaces with an address and an sshd each.
#
#   sudo bash tests/multihost.sh        (about three minutes on 2 cores; needs root, iproute2, openssh-server and pdsh)
#
# 1. two ranks on two hosts train as two ranks on one host do: the same losses to 1e-4
# 2. the link is cut until the ranks give up, then one host is killed with all its processes and comes back:
#    each time the run ends, is restarted by launch/supervise.sh, goes on from its checkpoint: still the same losses
# 3. with --min-hosts 1 the loss of a host for good leaves a run that finishes on the other
# 4. the check before the start names planted faults, and starts nothing
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
for tool in ip sshd ssh pdsh ssh-keygen unshare; do
    command -v "$tool" >/dev/null || { echo "multihost: skipped, $tool is not installed"; exit 0; }
done
[ "$(id -u)" -eq 0 ] || { echo "multihost: skipped, network namespaces need root"; exit 0; }
ip netns add mmscale-probe 2>/dev/null || { echo "multihost: skipped, this machine allows no network namespaces"; exit 0; }
ip netns delete mmscale-probe
[ -x "${MMSCALE_VENV:=$root/.venv}/bin/mmscale" ] || { echo "multihost: make the environment first: bash launch/test.sh"; exit 2; }
export MMSCALE_VENV OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
PATH=$MMSCALE_VENV/bin:$PATH

work=$(mktemp -d)
declare -A sshd_of=()
background=()
cleanup() {
    for pid in "${background[@]}"; do kill "$pid" 2>/dev/null || true; done
    for host in a b; do
        kill_host "$host"
        ip netns delete "mmscale-$host" 2>/dev/null || true
    done
    if [ -n "${KEEP:-}" ]; then echo "kept: $work"; else rm -rf "$work"; fi
}
trap cleanup EXIT

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

kill_host() {
    local pids
    pids=$(ip netns pids "mmscale-$1" 2>/dev/null) || return 0
    # shellcheck disable=SC2086 # a list of numbers
    [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
}

start_host() { # its sshd, with a name of its own; the second argument is run before it, with mounts of its own
    ip netns exec "mmscale-$1" unshare --uts --mount \
        bash -c "${2:-true} && hostname host-$1 && exec $(command -v sshd) -D -f $work/sshd_$1" &
    sshd_of[$1]=$!
    disown "${sshd_of[$1]}"
}

make_hosts() {
    local number host
    ssh-keygen -q -t ed25519 -N '' -f "$work/key"
    ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
    cp "$work/key.pub" "$work/authorized_keys"
    mkdir -p /run/sshd
    ip netns add mmscale-a
    ip netns add mmscale-b
    ip link add mmscale-va type veth peer name mmscale-vb
    for number in 1 2; do
        host=$(echo ab | cut -c "$number")
        ip link set "mmscale-v$host" netns "mmscale-$host" name eth0
        ip -n "mmscale-$host" address add "10.213.7.$number/24" dev eth0
        ip -n "mmscale-$host" link set lo up
        ip -n "mmscale-$host" link set eth0 up
        cat >"$work/sshd_$host" <<END
ListenAddress 10.213.7.$number
HostKey $work/host_key
AuthorizedKeysFile $work/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
END
        cat >>"$work/ssh" <<END
Host host-$host
    HostName 10.213.7.$number
END
        echo "host-$host slots=1" >>"$work/hostfile"
        start_host "$host"
    done
    cat >>"$work/ssh" <<END
Host *
    IdentityFile $work/key
    IdentitiesOnly yes
    UserKnownHostsFile $work/known_hosts
    StrictHostKeyChecking accept-new
    LogLevel ERROR
    ServerAliveInterval 5
    ServerAliveCountMax 3
END
    sleep 1
}

on_a() { ip netns exec mmscale-a unshare --uts bash -c 'hostname host-a; exec "$@"' on_a env SSH_ARGS="-F $work/ssh" "$@"; }

settings=(
    data.train="$work/data/train-*.tar" data.val="$work/data/val-*.tar" tokenizer.path="$work/tokenizer.model"
    train.samples=1920 train.global_batch=16 optim.warmup_samples=320 run.save_every=160 log.every=1 run.hang_s=8
    model.vision.layers=2 model.vision.width=64 model.text.width=64
)

same_losses() { # two run folders
    python - "$1" "$2" <<'END'
import json, sys
one, two = ([json.loads(line) for line in open(f"{folder}/metrics.jsonl")] for folder in sys.argv[1:])
assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 121)), "other steps"
worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two))
print(f"largest difference of the losses over {len(one)} steps: {worst:.2e}")
assert worst < 1e-4, "the losses differ"
END
}

wait_for_step() { # run folder, step
    for _ in $(seq 240); do
        if [ "$(tail -n 1 "$1/metrics.jsonl" 2>/dev/null | sed 's/.*"step": \([0-9]*\).*/\1/')" -ge "$2" ] 2>/dev/null; then
            return
        fi
        sleep 0.5
    done
    echo "multihost: step $2 of $1 did not come"
    exit 1
}

expect() { # code, log, command...: the command must end with this code; its output goes to the log
    local wanted=$1 log=$2 code=0
    shift 2
    "$@" >"$log" 2>&1 || code=$?
    [ "$code" -eq "$wanted" ] || { tail -n 40 "$log"; echo "multihost: code $code instead of $wanted from: $*"; exit 1; }
}

expect_end() { # pid, log: a command in the background must end well
    local code=0
    wait "$1" || code=$?
    [ "$code" -eq 0 ] || { tail -n 40 "$2"; echo "multihost: code $code, see above"; exit 1; }
}

events() { sed -n 's/.*"event": "resume".*"samples": \([0-9]*\).*"ranks": \([0-9]*\).*/  went on at sample \1 on \2 ranks/p' "$1/events.jsonl"; }

say "shards, and the run on one host"
mmscale toy "$work/data" --samples 512 --shards 2
mmscale tokenizer "$work/data/train-*.tar" "$work/tokenizer.model" --vocab-size 320
NPROC=2 expect 0 "$work/one.log" bash launch/local.sh configs/toy.yaml run.dir="$work/one" "${settings[@]}"

make_hosts
say "1. two hosts"
expect 0 "$work/two.log" on_a bash launch/hosts.sh "$work/hostfile" configs/toy.yaml run.dir="$work/two" "${settings[@]}"
grep -E "^host(-.)?  |ranks on|finished at" "$work/two.log"
same_losses "$work/one" "$work/two"

say "2. the link cut, then a host killed"
on_a bash launch/supervise.sh --backoff 4 --retries 12 -- bash launch/hosts.sh "$work/hostfile" configs/toy.yaml \
    run.dir="$work/faults" "${settings[@]}" >"$work/faults.log" 2>&1 &
run=$!
background+=("$run")
wait_for_step "$work/faults" 25
ip -n mmscale-b link set eth0 down
echo "link down"
sleep 25
ip -n mmscale-b link set eth0 up
echo "link up"
wait_for_step "$work/faults" 70
kill_host b
echo "host b killed"
sleep 5
start_host b
echo "host b is back"
expect_end "$run" "$work/faults.log"
grep -E "^supervise|not reachable" "$work/faults.log" | sort | uniq -c
events "$work/faults"
same_losses "$work/one" "$work/faults"

say "3. a host lost for good"
on_a bash launch/supervise.sh --backoff 2 -- bash launch/hosts.sh --min-hosts 1 "$work/hostfile" configs/toy.yaml \
    run.dir="$work/fewer" "${settings[@]}" >"$work/fewer.log" 2>&1 &
run=$!
background+=("$run")
wait_for_step "$work/fewer" 25
kill_host b
expect_end "$run" "$work/fewer.log"
events "$work/fewer"
same_losses "$work/one" "$work/fewer"

say "4. planted faults"
refused() { # code, words that the check must say...: and nothing may be started
    local wanted=$1 words
    shift
    expect "$wanted" "$work/refused.log" on_a bash launch/hosts.sh "$work/faulty" configs/toy.yaml run.dir="$work/never" "${settings[@]}"
    cat "$work/refused.log"
    for words in "$@"; do
        grep -Eq "$words" "$work/refused.log" || { echo "multihost: the check does not say: $words"; exit 1; }
    done
    [ ! -e "$work/never/metrics.jsonl" ]
}
cp "$work/hostfile" "$work/faulty"
sed 's/^__version__.*/__version__ = "0.0.0"/' mmscale/__init__.py >"$work/other.py"
mkdir "$work/empty" "$work/elsewhere"
start_host b "mount --bind $work/other.py $root/mmscale/__init__.py && mount --bind $work/empty $work/data"
ip netns exec mmscale-a python -m http.server --bind 10.213.7.1 29500 >/dev/null 2>&1 &
background+=("$!")
sleep 3
refused 2 "host-a .*port 29500: Address already in use" "host-b .*mmscale 0.0.0, here" "no shard matches"
kill "${background[-1]}"
kill_host b
start_host b "mount --bind $work/elsewhere $work/never"
sleep 1
refused 2 "host-a .*ready" "host-b .*run.dir is not the folder that this machine sees"
kill_host b
refused 1 "host-a .*ready" "host-b .*not reachable"

say "all passed"
