#!/usr/bin/env bash
# The quick benchmarks of another commit and of this checkout, one after the other on this machine, and what became
# slower beyond the noise. Ends with 1 when something did.
#
#   bash launch/benchmark.sh COMMIT [FOLDER]     (results go to FOLDER; default: benchmark/ in the checkout)
#
# THRESHOLD is the relative change of a median that counts, beside spreads that do not overlap. Machines that are
# rented by the minute are noisy: default 0.25.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"

case ${1:-} in
    "" | -*) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
cd "$MMSCALE_ROOT"
commit=$(git rev-parse --verify --quiet "$1^{commit}") || fail "$1 is no commit of this repository"
out=$(realpath -m "${2:-$MMSCALE_ROOT/benchmark}")
make_environment test
mkdir -p "$out"

before=$(mktemp -d)
built=$(mktemp -d)
trap 'git worktree remove --force "$before"; rm -rf "$built"' EXIT
git worktree add --force --detach "$before" "$commit"
if [ -f "$before/mmscale/data/jpeg.c" ]; then # its compiled part; this checkout's was built with the environment
    pip install --disable-pip-version-check --quiet --no-deps --target "$built" "$before"
    cp "$built"/mmscale/data/_jpeg*.so "$before/mmscale/data/" || true
fi
for side in "$before:old" "$MMSCALE_ROOT:new"; do
    cd "${side%:*}"
    # This folder's code, and not the one that the environment was made with.
    PYTHONPATH=$PWD python -m benchmarks.run --quick --output "$out/${side##*:}.json"
done
python -m benchmarks.compare "$out/old.json" "$out/new.json" --threshold "${THRESHOLD:-0.25}"
