#!/usr/bin/env bash
# Makes .venv from requirements.lock and checks that what breaks most often works. `make` runs this when the
# lock or pyproject.toml is newer than .venv/.installed; the Dockerfile runs it too.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '==> %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || fail "needs Python 3.11 (the lock is made for it); give it as PYTHON=/path/to/python3.11"

if [ ! -x .venv/bin/python ]; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv || fail "no venv module: install it (Debian: apt-get install python3.11-venv)"
fi

say "installing $(grep -c == requirements.lock) pinned packages (3 GB on disk; takes some minutes)"
if ! .venv/bin/python -m pip install --disable-pip-version-check --no-deps \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.lock |
    sed -u '/already satisfied/d'; then
    fail "pip could not install the lock. If it did not find torch==…+cpu, give the index of PyTorch's CPU
       wheels: make up TORCH_INDEX=<URL of PyTorch's CPU wheels>"
fi
# Wheels for another torch, which an earlier installation by hand may have left here.
.venv/bin/python -m pip uninstall --disable-pip-version-check -q -y torchvision torchaudio torchcodec 2>/dev/null || true
say "installing instructloop itself"
.venv/bin/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .

if ! .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing libnuma1, which vLLM needs, with apt-get"
        { apt-get update -q && apt-get install -q -y --no-install-recommends libnuma1; } ||
            fail "apt-get could not install libnuma1"
    else
        fail "vLLM needs libnuma: sudo apt-get install libnuma1"
    fi
fi

say "checking that the model classes can be imported"
.venv/bin/python -c 'from transformers import AutoModelForCausalLM, LlamaForCausalLM' ||
    fail "the model classes can't be imported (see above)"
touch .venv/.installed
say "set up"
