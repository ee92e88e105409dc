# What run_arithmetic.sh, run_cr.sh and run_glue.sh share; they source it with their own arguments.
# --dry-run prints the commands without running them. Other arguments are overrides of run_exp.py, after those of the script.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
SEEDS=${SEEDS:-42}
EVAL_OPTIONS=${EVAL_OPTIONS:-}  # further options of the evaluations, such as --limit=100
DRY_RUN=
OVERRIDES=()
for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then DRY_RUN=yes; else OVERRIDES+=("$argument"); fi
done

# train <override>...: do a run of LoRA-SB, unless it is finished; RUN is its folder
train() {
    local command=("$PYTHON" "$ROOT/run_exp.py" init=lora_sb "$@" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
    printf '%q ' "${command[@]}" && echo
    RUN="<run>"
    [[ -z $DRY_RUN ]] || return 0
    local log
    log=$(mktemp)
    "${command[@]}" | tee "$log"
    RUN=$(dirname "$(sed -n 's/^run: //p' "$log" | tail -n 1)")
    rm "$log"
}

# evaluate <benchmark> <option>...: score the run; the results are in its folder eval/
evaluate() {
    local benchmark=$1 && shift
    # shellcheck disable=SC2206  # several options in one variable
    local command=("$PYTHON" "$ROOT/eval/eval_$benchmark.py" "--adapter=$RUN" "$@" $EVAL_OPTIONS)
    printf '%q ' "${command[@]}" && echo
    [[ -n $DRY_RUN ]] || "${command[@]}"
}
