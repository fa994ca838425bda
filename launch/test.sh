#!/usr/bin/env bash
# Sets up an environment and runs the linter and all tests. Arguments go to pytest: launch/test.sh -k resume
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
make_environment test
cd "$MMSCALE_ROOT"
ruff check .
ruff format --check .
exec python -m pytest "$@"
