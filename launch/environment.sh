# Sourced by the other scripts: makes the virtual environment once and puts it on PATH.
#
#   MMSCALE_VENV     where the environment lives            (default: .venv in the checkout)
#   PYTHON           the interpreter it is made with        (default: python3)
#   TORCH_INDEX_URL  a wheel index to take PyTorch from, e.g. https://download.pytorch.org/whl/cpu:
#                    saves gigabytes of CUDA libraries on a machine without a GPU
#
# shellcheck shell=bash

MMSCALE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MMSCALE_VENV=${MMSCALE_VENV:-$MMSCALE_ROOT/.venv}
export DS_ACCELERATOR TOKENIZERS_PARALLELISM=false

fail() {
    echo "error: $*" >&2
    exit 2
}

# make_environment [EXTRAS]: installs mmscale with the tested versions; a second call with the same inputs is instant.
make_environment() {
    local extras=${1:-} python=${PYTHON:-python3} stamp
    command -v "$python" >/dev/null || fail "$python is not installed; on Debian or Ubuntu: sudo apt-get install python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is $("$python" -V 2>&1), but 3.10 or newer is needed; name another with PYTHON=/path/to/python3"
    if [ ! -x "$MMSCALE_VENV/bin/python" ] || [ ! -x "$MMSCALE_VENV/bin/pip" ]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "the Python package python3-venv is missing; on Debian or Ubuntu: sudo apt-get install python3-venv"
        echo "Making a virtual environment in $MMSCALE_VENV"
        "$python" -m venv "$MMSCALE_VENV" || fail "$MMSCALE_VENV could not be made"
    fi
    # The environment comes first on PATH: DeepSpeed looks for its programs there.
    PATH=$MMSCALE_VENV/bin:$PATH
    export PATH
    stamp=$(cat "$MMSCALE_ROOT/setup.py" "$MMSCALE_ROOT"/mmscale/data/jpeg*.[ch] "$MMSCALE_ROOT/configs/constraints.txt" \
        <(echo "$extras $MMSCALE_ROOT") | sha256sum)
    if [ "$stamp" != "$(cat "$MMSCALE_VENV/.mmscale-$extras" 2>/dev/null)" ]; then
        echo "Installing mmscale and the tested versions of what it needs (a minute or two, longer on a slow line)"
        if [ -n "${TORCH_INDEX_URL:-}" ]; then
            pip install --disable-pip-version-check --index-url "$TORCH_INDEX_URL" \
                "$(grep -E '^torch==' "$MMSCALE_ROOT/configs/constraints.txt")" || fail "PyTorch could not be installed from $TORCH_INDEX_URL"
        fi
        pip install --disable-pip-version-check -c "$MMSCALE_ROOT/configs/constraints.txt" -e "$MMSCALE_ROOT${extras:+[$extras]}" ||
            fail "the installation failed; the lines above say why"
        echo "$stamp" >"$MMSCALE_VENV/.mmscale-$extras"
    fi
}

# num_accelerators: how many GPUs PyTorch sees.
num_accelerators() {
    python -c 'import torch; print(torch.cuda.device_count())'
}
