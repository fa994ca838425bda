#!/usr/bin/env bash
# The whole way on toy data: shards, tokenizer, training under DeepSpeed, scores, export, reload, captions.
#
#   bash launch/quickstart.sh [--restart] [FOLDER]     (default: quickstart/ in the checkout)
#
# A second call goes on where the first one stopped and reuses what is there; --restart begins anew.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"

restart=no
out=$MMSCALE_ROOT/quickstart
for argument in "$@"; do
    case $argument in
        --restart) restart=yes ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) fail "unknown option $argument; see $0 --help" ;;
        *) out=$(realpath -m "$argument") ;;
    esac
done

started=$SECONDS
step() { printf '\n== %s  (%d:%02d)\n' "$*" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

step "1/7 Environment"
make_environment
if [ "$restart" = yes ]; then
    # Only what this script makes: a folder named by mistake keeps everything else.
    rm -rf "$out/data" "$out/tokenizer.model" "$out/run" "$out/hub" "$out/captions.png" "$out/scores.json"
fi
mkdir -p "$out"
cd "$MMSCALE_ROOT"

step "2/7 Toy shards"
if [ -e "$out/data/train-00000.tar" ]; then
    echo "$out/data is there: reused"
else
    mmscale toy "$out/data" --samples 4096 --shards 8 --seed 0
fi

step "3/7 Tokenizer"
if [ -e "$out/tokenizer.model" ]; then
    echo "$out/tokenizer.model is there: reused"
else
    mmscale tokenizer "$out/data/train-*.tar" "$out/tokenizer.model" --vocab-size 320
fi

step "4/7 Training with DeepSpeed, ZeRO-2"
gpus=$(num_accelerators)
if [ "$gpus" -gt 0 ]; then
    # The largest power of two that is there: it divides the global batch.
    processes=1
    while [ $((processes * 2)) -le "$gpus" ]; do processes=$((processes * 2)); done
else
    processes=2
    DS_ACCELERATOR=cpu
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
    export OMP_NUM_THREADS
fi
echo "$processes processes on $([ "$gpus" -gt 0 ] && echo "$gpus GPU(s)" || echo the CPU)"
deepspeed --num_accelerators "$processes" --module mmscale train configs/toy.yaml \
    run.dir="$out/run" data.train="$out/data/train-*.tar" data.val="$out/data/val-*.tar" tokenizer.path="$out/tokenizer.model"

step "5/7 Scores on held-out pictures"
mmscale eval "$out/run" --data "$out/data/val-*.tar" --distinct-pairs 256 --output "$out/scores.json"

step "6/7 Export to the Hugging Face Hub format"
if [ -e "$out/hub/config.json" ]; then
    echo "$out/hub is there: reused"
else
    mmscale export "$out/run" "$out/hub" --scores "$out/scores.json"
fi

step "7/7 Reload with stock transformers, caption three held-out pictures"
python launch/try_export.py "$out/hub" "$out/data/val-00000.tar"
mmscale caption "$out/hub" "$out/data/val-00000.tar" --limit 16 --picture "$out/captions.png" >/dev/null

cat <<END

Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. Have a look at:
  $out/captions.png        held-out pictures with the captions the model wrote
  $out/scores.json         zero-shot, retrieval and caption scores
  $out/run/metrics.jsonl   one line a logged step
  $out/run/checkpoints     resumable: the same command with train.samples=... goes on
  $out/hub                 the model in Hugging Face Hub format
END
