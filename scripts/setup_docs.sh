#!/usr/bin/env bash
# Create the environment of `make docs`, without the package and torch: scripts/setup_docs.sh <python> <folder>
set -euo pipefail
python=$1 venv=$2

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' |
    "$venv/bin/pip" install --quiet --constraint constraints.txt --requirement /dev/stdin
touch "$venv/installed"
