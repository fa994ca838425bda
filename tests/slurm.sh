#!/usr/bin/env bash
# launch/slurm.sbatch under a real Slurm that this machine plays: munged, slurmctld and two slurmd, all of their own.
#
#   sudo bash tests/slurm.sh        (about two minutes on 2 cores; needs root and Debian's slurm-wlm and munge)
#
# Submitted on two nodes, preempted by `scontrol requeue` in the middle, resumed by itself, finished, with the losses of
# a run that was never interrupted.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
for tool in slurmctld slurmd sbatch scontrol munged; do
    command -v "$tool" >/dev/null || { echo "slurm: skipped, $tool is not installed"; exit 0; }
done
[ "$(id -u)" -eq 0 ] || { echo "slurm: skipped, slurmd needs root"; exit 0; }
[ -x "${MMSCALE_VENV:=$root/.venv}/bin/mmscale" ] || { echo "slurm: make the environment first: bash launch/test.sh"; exit 2; }
export MMSCALE_VENV OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
PATH=$MMSCALE_VENV/bin:$PATH

work=$(mktemp -d)
chmod 755 "$work"
daemons=()
cleanup() {
    [ -z "${job:-}" ] || scancel "$job" 2>/dev/null || true
    sleep 1
    for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
    sleep 1
    if [ -n "${KEEP:-}" ]; then echo "kept: $work"; else rm -rf "$work"; fi
}
trap cleanup EXIT

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

start_cluster() {
    mkdir -p "$work/munge" "$work/state" "$work/spool"
    chmod 700 "$work/munge"
    head -c 1024 /dev/urandom >"$work/munge/key"
    chmod 400 "$work/munge/key"
    munged --foreground --force --key-file="$work/munge/key" --socket="$work/munge.socket" \
        --pid-file="$work/munge/pid" --seed-file="$work/munge/seed" --log-file="$work/munge/log" >"$work/munged.log" 2>&1 &
    daemons+=("$!")
    cat >"$work/slurm.conf" <<END
ClusterName=mmscale
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired.
AuthInfo=socket=$work/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName=node-a NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=node-b NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=all Nodes=node-a,node-b Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF=$work/slurm.conf
    for _ in $(seq 20); do [ -S "$work/munge.socket" ] && break; sleep 0.5; done
    slurmctld -D -f "$SLURM_CONF" >"$work/slurmctld.out" 2>&1 &
    daemons+=("$!")
    for node in node-a node-b; do
        mkdir -p "$work/spool/$node"
        slurmd -D -N "$node" -f "$SLURM_CONF" >"$work/slurmd-$node.out" 2>&1 &
        daemons+=("$!")
    done
    for _ in $(seq 60); do
        [ "$(sinfo -h -N -o %T 2>/dev/null | sort -u)" = idle ] && return
        sleep 0.5
    done
    echo "slurm: the nodes do not come up"
    sinfo || true
    tail -n 20 "$work"/slurm*.log "$work"/*.out
    exit 1
}

settings=(
    data.train="$work/data/train-*.tar" data.val="$work/data/val-*.tar" tokenizer.path="$work/tokenizer.model"
    train.samples=1280 train.global_batch=16 optim.warmup_samples=320 run.save_every=640 log.every=1
    model.vision.layers=2 model.vision.width=64 model.text.width=64
)

state() { scontrol show job "$job" -o | sed 's/.*JobState=\([A-Z]*\).*/\1/'; }

wait_for_step() {
    for _ in $(seq 240); do
        if [ "$(tail -n 1 "$work/run/metrics.jsonl" 2>/dev/null | sed 's/.*"step": \([0-9]*\).*/\1/')" -ge "$1" ] 2>/dev/null; then
            return
        fi
        sleep 0.25
    done
    echo "slurm: step $1 did not come"
    tail -n 30 "$work"/mmscale-*.log "$work"/run/logs/* || true
    exit 1
}

say "shards, and the run that is not interrupted"
mmscale toy "$work/data" --samples 512 --shards 2
mmscale tokenizer "$work/data/train-*.tar" "$work/tokenizer.model" --vocab-size 320
NPROC=2 bash launch/local.sh configs/toy.yaml run.dir="$work/one" "${settings[@]}" >"$work/one.log" 2>&1 ||
    { tail -n 40 "$work/one.log"; exit 1; }

say "a cluster of two nodes"
start_cluster
sinfo

say "submitted, and requeued in the middle"
job=$(MASTER_ADDR=127.0.0.1 sbatch --parsable --nodes=2 --ntasks-per-node=1 --output="$work/mmscale-%j.log" \
    launch/slurm.sbatch configs/toy.yaml run.dir="$work/run" "${settings[@]}")
wait_for_step 20
scontrol requeue "$job"
for _ in $(seq 600); do
    case $(state) in COMPLETED | FAILED | CANCELLED | TIMEOUT) break ;; esac
    sleep 0.5
done
scontrol show job "$job" -o | grep -o "JobState=[A-Z]* \|Restarts=[0-9]*"
cat "$work"/mmscale-*.log
grep -h '"event": "\(preempted\|resume\)"' "$work/run/events.jsonl"
ls "$work/run/logs"
[ "$(state)" = COMPLETED ]
grep -q '"status": "finished"' "$work/run/status.json"
grep -q '"event": "resume"' "$work/run/events.jsonl"
python - "$work/one" "$work/run" <<'END'
import json, sys
one, two = ([json.loads(line) for line in open(f"{folder}/metrics.jsonl")] for folder in sys.argv[1:])
assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 81)), "other steps"
worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two))
print(f"largest difference of the losses over {len(one)} steps: {worst:.2e}")
assert worst < 1e-4, "the losses differ"
END

say "all passed"
