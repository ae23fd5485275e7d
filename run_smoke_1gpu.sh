#!/usr/bin/env bash
# The whole pipeline on real text with one command: corpus, tokenizer, shards, training, compression, scoring.
# Without a GPU a small model for a fixed number of steps, whose score is the same on every machine and is compared with
# the expected one (records/smoke.json). With a GPU the full 11x512 shape for two minutes, after a check of the machine.
# Any setting of train_gpt.py given in the environment wins; RECIPE=<folder> takes that folder's recipe.env first.
set -euo pipefail
[ -z "${RECIPE:-}" ] || [ -d "$RECIPE" ] || { echo "error: RECIPE=$RECIPE: no such folder" >&2; exit 1; }
RECIPE="${RECIPE:+$(realpath "$RECIPE")}"
cd "$(dirname "$0")"
source records/lib.sh
use_python requirements.txt
text="${VOCAB_SIZE:+VOCAB_SIZE=$VOCAB_SIZE }${DATA_PATH:+DATA_PATH=$DATA_PATH }"
text="$text${TOKENIZER_PATH:+TOKENIZER_PATH=$TOKENIZER_PATH }"  # what of it was given

if [ -z "${DATA_PATH:-}" ]; then default CASEOPS_ENABLED 0; fi  # the local text is plain, whatever the recipe says
recipe() { if [ -n "$RECIPE" ]; then use_recipe "$RECIPE"; fi; }

machine="$("$PYTHON" records/gpu_check.py)"  # a wrong setting ends here too
echo "$machine"
if [ -n "${EVAL_ONLY:-}" ]; then default ARTIFACT_DIR logs/smoke_eval; fi  # beside the training's result, not over it
default ARTIFACT_DIR "logs/${RUN_ID:-smoke}"
default EVAL_STAGES all
if [ "$machine" != "no GPU is used" ]; then
    recipe
    default VOCAB_SIZE 8192
    default TRAIN_BATCH_TOKENS 196608
    default MAX_WALLCLOCK_SECONDS 120
    default EVAL_STRIDE 256
elif [ -n "${EVAL_ONLY:-}" ]; then  # an artifact has the settings of its model, recipe and evaluation
    default VOCAB_SIZE 1024
    default DTYPE fp32
else  # sizes that a CPU can train, whatever the recipe says; its techniques stay
    default VOCAB_SIZE 1024
    default MODEL_DIM 128
    default NUM_HEADS 4
    default NUM_KV_HEADS 2
    default TRAIN_SEQ_LEN 128
    default EVAL_SEQ_LEN auto
    default TRAIN_BATCH_TOKENS 2048
    default ITERATIONS 490
    default MAX_WALLCLOCK_SECONDS 900  # only a guard
    default WARMUP_STEPS 2
    default TRAIN_LOG_EVERY 50
    default MUON_MOMENTUM_WARMUP_STEPS 100
    default GPTQ_CALIBRATION_BATCHES 4
    default GPTQ_RESERVE_SECONDS auto
    default QUANT_MIN_WEIGHTS 8192
    default EVAL_STRIDE 64
    default SWA_EVERY 5
    default EVAL_BUDGET_SECONDS 600
    default DTYPE fp32  # the same numbers also where bf16 is fast
    average="${EMA_DECAY:-}" looping="${ENABLE_LOOPING_AT:-}"
    recipe
    default NUM_LAYERS 4
    if [ -z "$RECIPE" ]; then  # what learned most in so few steps (docs/log.md); defaults are for 5,000
        default NUM_LOOPS 0
        default PARALLEL_START_LAYER "$NUM_LAYERS"
        default SPARSE_ATTN_GATE_ENABLED 0
        default WARMDOWN_FRAC 0.72
        default EMA_BLEND 0
        default KEY_OFFSET 0
        default VE_ENABLED 0
        default TTT_MODE none
        default NGRAM_TILT_ENABLED 0  # the local text repeats itself
        default BIGRAM_VOCAB_SIZE 4096
        default BIGRAM_DIM 64
        default VARLEN_ENABLED 1
        default SMEAR_GATE_ENABLED 1
        default MUON_NS polar
        default MUON_ROW_NORMALIZE 1
        default MUON_QK_HEADS 0
    fi
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
started="$(mktemp)"
trap 'rm -f "$started"' EXIT
status=0
AUDIT=0 "$PYTHON" train_gpt.py || status=$?
summarise "$ARTIFACT_DIR" "$started" --compare
audit "$ARTIFACT_DIR" "$started" "$PYTHON" || status=$?
if [ "$status" -eq 0 ]; then
    cat <<END
files: $ARTIFACT_DIR (train.log, metrics.jsonl, result.json, final_model.int6.ptz, train_gpt.packed.py)
next: another shape       NUM_LAYERS=6 MODEL_DIM=192 ARTIFACT_DIR=logs/wide ./run_smoke_1gpu.sh
      test-time training  ${text}TTT_MODE=lora TTT_LORA_RANK=16 EVAL_ONLY=$ARTIFACT_DIR/final_model.int6.ptz ./run_smoke_1gpu.sh
      what can be set     $PYTHON train_gpt.py --help
END
fi
exit "$status"
