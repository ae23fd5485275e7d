#!/usr/bin/env bash
# The whole pipeline on real text with one command: corpus, tokenizer, shards, training, compression, scoring.
# Without a GPU a small model and about a minute of training; with one the full 11x512 shape for two minutes.
# Any setting of train_gpt.py given in the environment wins; RECIPE=<folder> takes that folder's recipe.env first.
set -euo pipefail
RECIPE="${RECIPE:+$(realpath "$RECIPE")}"
cd "$(dirname "$0")"
source records/lib.sh
use_python requirements.txt

recipe() { if [ -n "$RECIPE" ]; then use_recipe "$RECIPE"; fi; }

if [ "${DEVICE:-auto}" != cpu ] && [ "$(gpu_count)" -gt 0 ]; then
    recipe
    default VOCAB_SIZE 8192
    default TRAIN_BATCH_TOKENS 196608
    default MAX_WALLCLOCK_SECONDS 120
    default EVAL_STRIDE 256
else  # sizes that a CPU can train, whatever the recipe says; its techniques stay
    default VOCAB_SIZE 1024
    default MODEL_DIM 128
    default NUM_HEADS 4
    default NUM_KV_HEADS 2
    default TRAIN_SEQ_LEN 256
    default TRAIN_BATCH_TOKENS 4096
    default MAX_WALLCLOCK_SECONDS 60
    default WARMUP_STEPS 2
    default MUON_MOMENTUM_WARMUP_STEPS 100
    default GPTQ_CALIBRATION_BATCHES 4
    default GPTQ_RESERVE_SECONDS auto
    default QUANT_MIN_WEIGHTS 8192
    default EVAL_STRIDE 128
    default SWA_EVERY 5
    default EVAL_BUDGET_SECONDS 60
    average="${EMA_DECAY:-}" looping="${ENABLE_LOOPING_AT:-}"
    recipe
    default NUM_LAYERS 4
    # a few hundred steps are too few for long averages, and for a step number of a full run
    if [ -z "$average" ] && [ "${EMA_DECAY:-}" != 0 ]; then export EMA_DECAY=0.98; fi
    if [ -z "$looping" ] && [[ "${ENABLE_LOOPING_AT:-0}" =~ ^[0-9]{2,}$ ]]; then export ENABLE_LOOPING_AT=0.55; fi
fi
if [ -z "${DATA_PATH:-}" ]; then
    name="local_sp$VOCAB_SIZE"
    export DATA_PATH="data/datasets/$name"
    default TOKENIZER_PATH "data/tokenizers/local_${VOCAB_SIZE}_bpe.model"
    if [ ! -e data/local/docs_val.jsonl ]; then "$PYTHON" data/local_corpus.py --out data/local; fi
    if [ ! -e "$DATA_PATH" ]; then
        "$PYTHON" data/tokenize_docs.py --train data/local/docs_train.jsonl --val data/local/docs_val.jsonl \
            --out data --name "$name" --vocab-size "$VOCAB_SIZE"
    fi
fi
default ARTIFACT_DIR "logs/${RUN_ID:-smoke}"
started="$(mktemp)"
trap 'rm -f "$started"' EXIT
status=0
"$PYTHON" train_gpt.py || status=$?
summarise "$ARTIFACT_DIR" "$started"
exit "$status"
