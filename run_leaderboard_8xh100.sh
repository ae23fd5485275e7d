#!/usr/bin/env bash
# Train seeds one after another on all GPUs of this machine, after checking GPUs, settings and shards.
#
#   ./run_leaderboard_8xh100.sh                                    the defaults, seeds 42 314 999
#   ./run_leaderboard_8xh100.sh records/<track>/<recipe> 42 0      a recipe's settings, seeds 42 and 0
#
# Settings in the environment win over the recipe; SEED="42 0" gives seeds too. NPROC=<n> takes n processes instead
# of one a GPU. Each run is written to logs/<recipe>_seed<seed>, and audited by records/audit.py (AUDIT=0: not).
set -euo pipefail
[ ! -d "${1:-}" ] || set -- "$(realpath "$1")" "${@:2}"
cd "$(dirname "$0")"
source records/lib.sh

recipe=defaults folder=
if [ -n "${1:-}" ] && [ -d "$1" ]; then
    [ -e "$1/recipe.env" ] || { echo "error: $1: no recipe.env in it" >&2; exit 1; }
    folder="$1"
    recipe="$(basename "$1")"
    shift
fi
seeds=("$@")
[ ${#seeds[@]} -gt 0 ] || read -ra seeds <<<"${SEED:-42 314 999}"
[ ${#seeds[@]} -gt 0 ] || { echo "error: SEED=$SEED: takes numbers, as SEED=\"42 0\"" >&2; exit 1; }
for seed in "${seeds[@]}"; do
    [[ "$seed" =~ ^[0-9]+$ ]] || { echo "error: $seed: neither a recipe's folder nor a seed" >&2; exit 1; }
done
unset SEED  # each run gets its own; a list of them is none
use_python requirements.txt
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"
[[ "$NPROC" =~ ^[0-9]+$ ]] || { echo "error: NPROC=$NPROC: takes a number of processes" >&2; exit 1; }
if [ "$NPROC" -eq 0 ]; then
    echo "error: no GPU here; ./run_smoke_1gpu.sh runs anywhere, NPROC=<n> forces n processes" >&2
    exit 1
fi
[ "$NPROC" -eq 8 ] || echo "note: $NPROC processes; the leaderboard's machine has 8"
[ -z "$folder" ] || use_recipe "$folder"
default AUDIT 1  # what a submission needs
default EVAL_STAGES final  # the challenge's 600 s of evaluation hold the score that counts and nothing else
start=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC")

config="$("$PYTHON" train_gpt.py --config)"  # a wrong setting ends here, before any GPU is touched
"$PYTHON" records/gpu_check.py --record  # so does a machine on which the run would be lost
mapfile -t places < <("$PYTHON" -c '
import json, sys
config = json.loads(sys.argv[1])
print(config["data_path"], config["tokenizer_path"], sep="\n")' "$config")
for path in "${places[0]}"/fineweb_{train,val}_*.bin "${places[1]}"; do  # a pattern stays where nothing is found
    [ -e "$path" ] && continue
    echo "error: $path: no such file; data/cached_challenge_fineweb.py downloads the published data" >&2
    exit 1
done
shards=("${places[0]}"/fineweb_train_*.bin)
echo "$recipe: seeds ${seeds[*]}, $NPROC processes, ${#shards[@]} train shards"

worst=0
started="$(mktemp)"
trap 'rm -f "$started"' EXIT
for seed in "${seeds[@]}"; do
    out="logs/${recipe}_seed$seed"
    echo "=== seed $seed -> $out"
    touch "$started"
    status=0
    AUDIT=0 SEED="$seed" ARTIFACT_DIR="$out" "${start[@]}" train_gpt.py || status=$?
    summarise "$out" "$started"
    [ "$out/result.json" -nt "$started" ] || { echo "error: seed $seed did not finish" >&2; exit 1; }
    audit "$out" "$started" "${start[@]}" || status=$?
    [ "$status" -le "$worst" ] || worst="$status"
done
exit "$worst"
