#!/usr/bin/env bash
# Train seeds one after another on all GPUs of this machine, after checking GPUs, settings and shards.
#
#   ./run_leaderboard_8xh100.sh                                    the defaults, seeds 42 314 999
#   ./run_leaderboard_8xh100.sh records/<track>/<recipe> 42 0      a recipe's settings, seeds 42 and 0
#
# Settings given in the environment win over the recipe. NPROC=<n> takes n processes instead of one a GPU.
# Each run is written to logs/<recipe>_seed<seed>.
set -euo pipefail
cd "$(dirname "$0")"
source records/lib.sh

recipe=defaults
if [ -n "${1:-}" ] && [ -d "$1" ]; then
    [ -e "$1/recipe.env" ] || { echo "error: $1: no recipe.env in it" >&2; exit 1; }
    use_recipe "$1/recipe.env"
    recipe="$(basename "$1")"
    shift
fi
seeds=("$@")
[ ${#seeds[@]} -gt 0 ] || seeds=(42 314 999)
for seed in "${seeds[@]}"; do
    [[ "$seed" =~ ^[0-9]+$ ]] || { echo "error: $seed: neither a recipe's folder nor a seed" >&2; exit 1; }
done
gpus="$(gpu_count)"
if [ "$gpus" -eq 0 ] && [ -z "${NPROC:-}" ]; then
    echo "error: no GPU here; ./run_smoke_1gpu.sh runs anywhere, NPROC=<n> forces n processes" >&2
    exit 1
fi
NPROC="${NPROC:-$gpus}"
[ "$NPROC" -eq 8 ] || echo "note: $NPROC processes; the leaderboard's machine has 8"
use_python requirements.txt

config="$("$PYTHON" train_gpt.py --config)"  # a wrong setting ends here, before any GPU is touched
read -r data_path tokenizer_path < <("$PYTHON" -c '
import json, sys
config = json.loads(sys.argv[1])
print(config["data_path"], config["tokenizer_path"])' "$config")
for pattern in "$data_path/fineweb_train_*.bin" "$data_path/fineweb_val_*.bin" "$tokenizer_path"; do
    compgen -G "$pattern" >/dev/null || { echo "error: $pattern: no such file" >&2; exit 1; }
done
echo "$recipe: seeds ${seeds[*]}, $NPROC processes, $(compgen -G "$data_path/fineweb_train_*.bin" | wc -l) train shards"

worst=0
for seed in "${seeds[@]}"; do
    folder="logs/${recipe}_seed$seed"
    echo "=== seed $seed -> $folder"
    status=0
    SEED="$seed" ARTIFACT_DIR="$folder" "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" \
        train_gpt.py || status=$?
    if [ -e "$folder/result.json" ]; then "$PYTHON" records/summary.py "$folder"; fi
    [ "$status" -le "$worst" ] || worst="$status"
    [ -e "$folder/result.json" ] || { echo "error: seed $seed did not finish" >&2; exit 1; }
done
exit "$worst"
