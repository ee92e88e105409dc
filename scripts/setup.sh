#!/usr/bin/env bash
# Create a virtual environment with exactly the tested versions: scripts/setup.sh <python> <folder>
set -euo pipefail
python=$1 venv=$2

command -v "$python" >/dev/null || { echo "setup: $python not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version 2>&1) is too old, Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
"$python" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "setup: $python has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --constraint constraints.txt torch  # first, so that no other package chooses its build
"$venv/bin/pip" install --quiet --constraint constraints.txt --editable '.[dev]'
touch "$venv/installed"
