#!/usr/bin/env bash
# Create a virtual environment with exactly the tested versions: scripts/setup.sh <python> <folder>
set -euo pipefail
python=$1 venv=$2

command -v "$python" >/dev/null || { echo "setup: $python not found; install Python 3.11 or newer, or choose another one: make PYTHON=python3.12" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version 2>&1) is too old; install Python 3.11 or newer, or choose another one: make PYTHON=python3.12" >&2; exit 1; }
"$python" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "setup: $python has no venv module; install it (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --constraint constraints.txt torch  # first, so that other packages do not install another build of torch
"$venv/bin/pip" install --quiet --constraint constraints.txt --editable '.[dev]'
touch "$venv/installed"
