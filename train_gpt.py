"""Train a GPT in a fixed time, compress it into a fixed number of bytes, score it in bits per byte.

One file that runs under `python` or `torchrun`, on CPU or GPU, configured by environment variables alone
(`--help` lists them). It reads from top to bottom:

  settings          one frozen dataclass: every environment variable, its default and its meaning
  building blocks   causal attention, norms, activations and losses in plain PyTorch
  projections       the one place where a weight meets activations, and what may ride on it
  model             one forward pass with all techniques; weights in parameter banks; a layer order of (layer, visit)
  kernels           faster forms of the building blocks: attention backends, Triton kernels (FUSED=1)
  runtime           device, processes, signals, log files, the training clock
  data              token shards, the tokenizer's byte counts, shuffled windows or packed documents
  optimizers        Muon on the banks (sharded over ranks), AdamW on the rest
  training          schedules, compile warm-up, the loop, EMA and SWA, quantization-aware forms, checkpoints
  calibration       second moments of inputs and of gradients, from text
  rounding          codes of a matrix from its weights and Hessian: GPTQ on SDClip's grid, or along a trellis
  quantization      step sizes by the loss's sensitivity; what is stored of each matrix, and weights from it
  entropy coding    integers to bytes and back: ANS with tables of expected size, Brotli, LZMA
  artifact          the container (no pickle), filling the budget, the ZIP application that is counted
  scoring           the one place where losses become nats and bytes; the n-gram tilt
  adaptation        test-time training: weights and adapters that learn from scored text; batches; the time for it
  evaluation        windows and documents, from the artifact's weights to losses
  reading settings  environment variables to settings: other names, misspelt ones, contradictions, --help
  main              the run from start to result.json; records/audit.py judges it from outside

The default model: GQA, partial rotary, offset keys, value embeddings, query/key norm and gain, XSA, LeakyReLU(0.5)^2
MLP, gated U-Net skips, depth recurrence, parallel residuals, attention inside documents, smear and output gates, tied
embedding. Off by default, each by its settings: hashed bigrams, blends of the recurrence, untied or factorised
embeddings.

Importing it runs nothing. Formulas cite the paper or the openai/parameter-golf pull request ("PR n") they come from.
"""

import ctypes
import dataclasses
import fcntl
import glob
import hashlib
import importlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # not on every machine; the kernels' plain forms run instead
    triton = constexpr = None

# ----------------------------------------------------------------------------------------------------------------------
# Settings
#
# In: values by name, which read_environment() (by main) takes from the environment. Out: one frozen Settings, every
# value of it checked, `auto` values resolved but for those that the device decides.


MIN_ROWS = 64  # of a step, where rows longer than a window are chosen


class RunError(Exception):
    """Something the user can mend: main() prints it as one line, `error: ...`, and exits with status 1."""


def setting(default, group, meaning="", *, low=0, high=None, choices="", aliases=None, proof="") -> Any:
    """One field of Settings. None as a default means `auto`; numbers lie from `low` to `high`. `proof`: a record that
    ran with this default at full size, on three seeds, or where our own measurements of it stand.

    `aliases` maps another environment name to {its value: ours}, to a function from one to the other, or to {} when
    it takes the same values. Several of ours, the likeliest first: it allows each of them. Under the field's own name
    the map translates values of the field's other scripts (COMPRESSOR=pergroup).
    """
    meta = {"group": group, "help": meaning, "low": low, "high": high, "choices": choices.split(),
            "aliases": aliases or {}, "proof": proof}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. A field's environment name is its name in capitals. An instance is always valid."""

    run_id: str | None = setting(None, "run", "name of the run; auto: the time, SEED and a random number")
    artifact_dir: str | None = setting(None, "run", "folder where the run writes all its files; auto: logs/<RUN_ID>")
    seed: int = setting(1337, "run", "seed of the initial weights and of the training data's order", high=2**63 - 1)
    device: str = setting("auto", "run", "device to run on; auto: the GPU if PyTorch finds one, else the CPU",
                          choices="auto cpu cuda")
    dtype: str = setting("auto", "run", "number format of matrix products; auto: bf16 where it is fast",
                         choices="auto bf16 fp32")
    compile: str = setting("auto", "run", "1: compile the model by torch.compile; auto: on GPUs", choices="auto 0 1")
    attention: str = setting("auto", "run", "attention backend; auto: the first that works on this machine",
                             choices="auto fa3 fa2 varlen sdpa")
    fused: bool = setting(False, "run", "Triton kernels for the MLP and the head's loss, whose speed is not measured")
    eval_only: str = setting("", "run", "path of an artifact to load and score instead of training",
                             aliases={"EVAL_ONLY_PATH": {}})
    save_model: bool = setting(False, "run", "also write the averaged weights before compression, as final_model.pt")
    checkpoint_every: int = setting(0, "run", "training steps between writes of checkpoint.pt; 0: no checkpoints")
    resume: bool = setting(False, "run", "continue training from checkpoint.pt in ARTIFACT_DIR")
    audit: bool = setting(False, "run", "run records/audit.py on the finished run; several processes print a reminder")
    train_log_every: int = setting(50, "run", "training steps between log lines", low=1)
    val_loss_every: int = setting(0, "run", "training steps between validation scores; 0: none during training")

    data_dir: str = setting("./data", "data", "folder that holds datasets/ and tokenizers/")
    data_path: str | None = setting(None, "data", "folder of the shards; auto: "
                                    "<DATA_DIR>/datasets/fineweb10B_sp<VOCAB_SIZE>[_caseops]")
    bos_id: int | None = setting(None, "data", "id of the token that starts a document; auto: the tokenizer's BOS")
    tokenizer_path: str | None = setting(None, "data", "SentencePiece model; auto: "
                                         "<DATA_DIR>/tokenizers/fineweb_<VOCAB_SIZE>_bpe[_caseops].model")
    vocab_size: int = setting(8192, "data", "number of tokens in the vocabulary", low=2, high=65536)
    caseops_enabled: bool | None = setting(None, "data", "the shards hold CaseOps text (marked capitals) and have "
                                           "sidecar files; auto: if there are such shards", proof="PR 1855")

    num_layers: int = setting(11, "model", "transformer layers; a looped one counts once", low=1, high=1024)
    model_dim: int = setting(512, "model", "width of the residual stream", low=8)
    num_heads: int = setting(8, "model", "number of query heads", low=1)
    num_kv_heads: int = setting(4, "model", "number of key/value heads, each shared by a group of query heads", low=1)
    mlp_mult: float = setting(4.0, "model", "hidden width of the MLP as a multiple of MODEL_DIM", low=0.1)
    rope_dims: int = setting(16, "model", "dimensions of each head that get the rotary position embedding")
    rope_base: float = setting(10000.0, "model", "base of the rotary frequencies", low=1.0)
    key_offset: bool = setting(True, "model", "a key's unrotated dimensions are the token before's", proof="log")
    qk_gain_init: float = setting(5.0, "model", "initial value of the learned gain on each head's normalised queries")
    xsa_last_n: int = setting(11, "model", "XSA in this many last layers: attention output minus its part along the "
                              "token's own value")
    ln_scale: bool = setting(True, "model", "multiply layer n's normalised inputs by 1/sqrt(n+1), with n from 0")
    skip_gates_enabled: bool = setting(True, "model", "blend each U-Net skip into the stream by a learned gate instead "
                                       "of adding it")
    loop_start: int | None = setting(None, "model", "first layer of the looped range, counted from 0; auto: 3 of "
                                     "11, or in that proportion", proof="PR 1855",
                                     aliases={"RECUR_START": {}, "RECUR_LAYERS": lambda raw: layers_in_a_row(raw)[0]})
    loop_end: int | None = setting(None, "model", "last layer of the looped range, counted from 0; auto: 5 of 11, or "
                                   "in that proportion", proof="PR 1855",
                                   aliases={"RECUR_END": {}, "RECUR_LAYERS": lambda raw: layers_in_a_row(raw)[-1]})
    num_loops: int = setting(2, "model", "how often layers LOOP_START to LOOP_END run again", proof="PR 1855",
                             aliases={"RECUR_PASSES": {"1": "0", "2": "1", "3": "2", "4": "3"},
                                      "RECUR_LAYERS": lambda raw: "1"})
    recur_blend: str = setting("none", "model", "blend a repeated layer's output with its input (alpha, gate) or last "
                               "output (ab)", choices="none alpha ab gate",
                               aliases={"RECUR_ALPHA_ENABLED": {"1": "alpha", "0": "none ab gate"},
                                        "RECUR_AB_ENABLED": {"1": "ab", "0": "none alpha gate"}})
    recur_alpha_init: float = setting(1.0, "model", "initial weight of the layer's output in RECUR_BLEND=alpha",
                                      low=-10)
    recur_a_init: float = setting(1.0, "model", "initial weight of the layer's output in RECUR_BLEND=ab", low=-10)
    recur_b_init: float = setting(0.0, "model", "initial weight of the layer's previous output in RECUR_BLEND=ab",
                                  low=-10)
    parallel_start_layer: int | None = setting(None, "model", "first layer that runs attention and MLP in parallel, "
                                               "NUM_LAYERS: none; auto: 8 of 11, or in that proportion",
                                               proof="PR 1855",
                                               aliases={"PARALLEL_RESIDUAL_START": {}, "PARALLEL_RESID_START": {}})
    parallel_mode: str = setting("crossed", "model", "parallel attention and MLP: on one stream (gptj), one stream "
                                 "each, or writing to both (crossed)", choices="gptj lanes crossed", proof="PR 1855")
    parallel_final_lane: str = setting("mean", "model", "stream that the head reads with PARALLEL_MODE=crossed; mean: "
                                       "the mean of both", choices="mean attn mlp")
    varlen_enabled: bool = setting(True, "model", "attention stays inside a document (variable-length attention)",
                                   proof="PR 1855")
    bigram_vocab_size: int = setting(0, "model", "rows of the hashed bigram embedding; 0: no bigram embedding")
    bigram_dim: int = setting(112, "model", "width of the rows of the bigram embedding", low=2)
    bigram_signs: bool = setting(False, "model", "multiply bigram rows by signs that hang on both tokens")
    smear_gate_enabled: bool = setting(True, "model", "mix the previous token's embedding into each token's, inside a "
                                       "document", proof="PR 1855")
    smear_gate_mode: str = setting("input", "model", "smear gate; input: from GATE_WINDOW inputs, before the norm; "
                                   "vector: by channel, after the norm", choices="input vector")
    ve_enabled: bool | None = setting(None, "model", "add token embeddings to attention's values in VE_LAYERS; auto: "
                                      "with QUANT_ALLOCATION=auto", proof="log")
    ve_dim: int = setting(0, "model", "width of a table that VE_LAYERS share by a matrix; 0: each has its own table")
    ve_bigram_rows: int = setting(0, "model", "rows of a second table of values, for hashed bigrams; 0: no such table")
    ve_layers: str | None = setting(None, "model", "layers with value embeddings, as 9,10; auto: three, evenly spaced")
    sparse_attn_gate_enabled: bool | None = setting(None, "model", "gate each head's output by the first GATE_WINDOW "
                                                    "inputs, from 1/2 on; auto: unless another gate is on",
                                                    proof="PR 1855")
    sparse_attn_gate_scale: float = setting(0.5, "model", "factor inside the sigmoid of SPARSE_ATTN_GATE_ENABLED's "
                                            "gates", proof="PR 1855")
    gated_attn_enabled: bool = setting(False, "model", "gate each head's output by all inputs of the layer; gates "
                                       "start near 1/2")
    attn_out_gate_enabled: bool = setting(False, "model", "gate each head's output by the first GATE_WINDOW inputs; "
                                          "every gate starts at 1")
    gate_window: int = setting(12, "model", "first input channels that the sparse, output and smear gates read", low=1)
    rope_yarn: bool = setting(False, "model", "raise ROPE_BASE where attention spans more than TRAIN_SEQ_LEN tokens")
    tie_embeddings: bool = setting(True, "model", "use the token embedding as the weight of the output head")
    embedding_dim: int = setting(0, "model", "width of a factorised token embedding; 0: MODEL_DIM, not factorised")
    logit_softcap: float = setting(30.0, "model", "c in logits = c tanh(z/c), which keeps the logits between -c and c",
                                   low=1e-3)
    tied_embed_init_std: float = setting(0.005, "model", "standard deviation of the initial token embedding")

    train_batch_tokens: int = setting(786432, "train", "tokens of one optimizer step, summed over all processes", low=1)
    train_seq_len: int = setting(2048, "train", "tokens of one training window", low=2)
    train_seq_schedule: str = setting("", "train", "growing context; 1024@0.1,2048@0.7: windows of 1024 tokens up to a "
                                      "tenth of training, 2048 up to 0.7, then TRAIN_SEQ_LEN, the most")
    seq_change_warmup_steps: int = setting(0, "train", "steps in which the learning rates rise from 0 again when "
                                           "TRAIN_SEQ_SCHEDULE changes the windows")
    micro_batch_tokens: int | None = setting(None, "train", "tokens of one forward pass in training; auto: 98304 on a "
                                             "GPU of 80 GB, 8192 on a CPU", low=1)
    iterations: int = setting(20000, "train", "most optimizer steps; 0: only the clock ends training. Schedules follow "
                              "the nearer limit")
    max_wallclock_seconds: float = setting(600.0, "train", "seconds that training and calibration may take; 0: no "
                                           "limit")
    warmup_steps: int = setting(20, "train", "steps on random tokens that compile the model before the clock starts")
    warmdown_frac: float = setting(0.85, "train", "last share of training, in which the learning rates fall (warmdown)",
                                   high=1.0, proof="PR 1855")
    warmdown_shape: str = setting("linear", "train", "curve by which the learning rates fall in the warmdown",
                                  choices="linear cosine")
    min_lr: float = setting(0.1, "train", "smallest factor on the learning rates in the warmdown", high=1.0,
                            proof="PR 1855", aliases={"LR_FLOOR": {}})
    enable_looping_at: float = setting(0.35, "train", "share of training after which layers loop; above 1: a step "
                                       "number", aliases={"RECUR_START_STEP": lambda raw: "0" if raw == "1" else raw})
    loop_schedule: str = setting("", "train", "loops by stage, not by ENABLE_LOOPING_AT; 0.35:1,0.55:2 means 1 from "
                                 "0.35, 2 from 0.55")
    matrix_lr: float = setting(0.026, "train", "Muon learning rate of the weight matrices")
    muon_momentum: float = setting(0.97, "train", "Muon momentum after its warm-up", high=1.0)
    muon_momentum_warmup_start: float = setting(0.92, "train", "Muon momentum at step 0", high=1.0)
    muon_momentum_warmup_steps: int = setting(1500, "train", "steps in which Muon's momentum rises to MUON_MOMENTUM")
    muon_backend_steps: int = setting(5, "train", "Newton-Schulz iterations in each Muon step", low=1)
    muon_ns: str = setting("polar", "train", "Newton-Schulz coefficients of Muon; polar: Polar Express",
                           choices="quintic polar", proof="PR 1855")
    muon_row_normalize: bool = setting(True, "train", "MuonEq-R: scale rows to norm 1 before Newton-Schulz",
                                       proof="PR 1855", aliases={"MUON_EQR": {}})
    muon_qk_heads: bool = setting(True, "train", "Muon steps of queries and keys head by head", proof="log")
    muon_wd: float = setting(0.095, "train", "decoupled weight decay of the weight matrices")
    tied_embed_lr: float = setting(0.03, "train", "AdamW learning rate of the embedding and other tables")
    head_lr: float = setting(0.008, "train", "AdamW learning rate of the head if TIE_EMBEDDINGS=0")
    embed_wd: float = setting(0.085, "train", "weight decay of the tables and of an untied head")
    scalar_lr: float = setting(0.02, "train", "AdamW learning rate of vectors and scalars")
    adam_wd: float = setting(0.02, "train", "weight decay of vectors and scalars")
    beta1: float = setting(0.9, "train", "AdamW beta 1 in training", high=0.999999)
    beta2: float = setting(0.99, "train", "AdamW beta 2 in training", high=0.999999, proof="PR 1855")
    adam_eps: float = setting(1e-8, "train", "AdamW epsilon in training")
    grad_clip_norm: float = setting(0.3, "train", "norm to which gradients, all together, are clipped; 0: no clipping")
    ema_decay: float = setting(0.9965, "train", "decay of the weights' moving average (EMA); 0: none", high=0.999999)
    ema_blend: float = setting(0.5, "train", "AVERAGE=ema: share of the last step's weights in what is kept", high=1.0,
                               proof="log")
    swa_enabled: bool = setting(False, "train", "average snapshots of the weights from the end of training (SWA)")
    swa_every: int = setting(50, "train", "training steps between SWA snapshots", low=1)
    swa_start_scale: float = setting(0.2, "train", "factor on the learning rates below which SWA takes snapshots")
    average: str | None = setting(None, "train", "weights kept after training; ema+swa: SWA of the EMA; auto: those "
                                  "that are on", choices="ema swa ema+swa")
    qat_enabled: bool = setting(False, "train", "late QAT: train on weights rounded to SDClip's grid; sets "
                                "QUANT_ALLOCATION=sdclip",
                                aliases={"LATE_QAT_THRESHOLD": lambda raw: "1 0" if raw.strip("0.") else "0"})
    qat_start_scale: float = setting(0.15, "train", "factor on the learning rates below which late QAT starts",
                                     aliases={"LATE_QAT_THRESHOLD": {}})
    qat_lite_enabled: bool = setting(False, "train", "QAT-lite: a penalty pulls query and key matrices toward the "
                                     "quantization grid")
    qat_lite_start_frac: float = setting(0.55, "train", "share of training after which the QAT-lite penalty starts",
                                         high=1.0)
    qat_lite_every: int = setting(4, "train", "training steps between QAT-lite penalties", low=1)
    qat_lite_lambda: float = setting(0.02, "train", "weight of the QAT-lite penalty at the end of training; it grows "
                                     "linearly from 0")
    qat_lite_bits: int = setting(6, "train", "bits of the QAT-lite grid", low=2, high=8)
    qat_lite_clip_sigmas: float = setting(12.85, "train", "half-width of the QAT-lite grid, in standard deviations of "
                                          "a row", low=0.1)
    qat_lite_layer_start: int = setting(7, "train", "first layer that the QAT-lite penalty acts on")
    qat_lite_penalty: str = setting("mse", "train", "QAT-lite penalty: squared rounding error, excess over the grid, "
                                    "or both", choices="mse clip hybrid")
    qat_lite_depth_power: float = setting(0.0, "train", "QAT-lite weighs layer n by ((n+1)/NUM_LAYERS) to this power")

    matrix_bits: int = setting(6, "quant", "QUANT_ALLOCATION=sdclip: bits of a weight in the matrices", low=2, high=8)
    embed_bits: int = setting(8, "quant", "QUANT_ALLOCATION=sdclip: bits of a weight in the embedding tables and the "
                              "head", low=2, high=8)
    matrix_clip_sigmas: float = setting(12.85, "quant", "QUANT_ALLOCATION=sdclip: half-width of a row's grid, in "
                                        "standard deviations of the row", low=0.1)
    attn_clip_sigmas: float | None = setting(None, "quant", "QUANT_ALLOCATION=sdclip: half-width of the grid for "
                                             "attention; auto: MATRIX_CLIP_SIGMAS", low=0.1)
    mlp_clip_sigmas: float | None = setting(None, "quant", "QUANT_ALLOCATION=sdclip: half-width of the grid for the "
                                            "MLP; auto: MATRIX_CLIP_SIGMAS", low=0.1)
    embed_clip_sigmas: float = setting(20.0, "quant", "QUANT_ALLOCATION=sdclip: half-width of the grid for the "
                                       "embedding tables and the head", low=0.1)
    quant_allocation: str = setting("auto", "quant", "auto: step sizes from the loss's sensitivity, as fine as the "
                                    "budget allows; sdclip: from each row's std", choices="auto sdclip", proof="log")
    quant_trellis: bool = setting(True, "quant", "QUANT_ALLOCATION=auto with COMPRESSOR=ans: round along a trellis",
                                  proof="log")
    lqer_enabled: bool = setting(False, "quant", "LQER: low-rank corrections of the matrices with the largest errors")
    lqer_rank: int = setting(4, "quant", "rank of an LQER correction", low=1)
    lqer_top_k: int = setting(3, "quant", "number of matrices that get an LQER correction", low=1)
    lqer_factor_bits: int = setting(4, "quant", "bits of each number in LQER's factors", low=1, high=7)
    lqer_asym_group: int = setting(64, "quant", "numbers of an LQER factor that share a scale", low=1)
    quant_min_weights: int = setting(65536, "quant", "matrices with fewer weights than this are stored as fp16")
    gptq_calibration: str = setting("train", "quant", "calibration text: training text, text that the model writes, or "
                                    "random tokens", choices="train self random")
    gptq_calibration_batches: int = setting(16, "quant", "calibration batches of MICRO_BATCH_TOKENS, over all "
                                            "processes", low=1, aliases={"GPTQ_CALIB_BATCHES": {}})
    gptq_reserve_seconds: float | None = setting(None, "quant", "seconds of the training clock kept for calibration; "
                                                 "auto: measured in the warm-up")

    compressor: str = setting("ans", "pack", "coder of the artifact; ans: asymmetric numeral systems",
                              choices="ans brotli lzma", aliases={"COMPRESSOR": {"pergroup": "ans"}}, proof="log")
    artifact_budget_bytes: int = setting(16_000_000, "pack", "most bytes that the compressed model and the code may "
                                         "take together", low=1)

    eval_seq_len: int | None = setting(None, "eval", "tokens of an evaluation window; auto: TRAIN_SEQ_LEN", low=1)
    eval_budget_seconds: float = setting(600.0, "eval", "seconds from loading the artifact to the last score; TTT "
                                         "stops early to keep them; 0: no limit")
    eval_stages: str = setting("final", "eval", "scores taken on the evaluation's clock: all, or only the final "
                               "one", choices="all final")
    ttt_mode: str = setting("phased", "eval", "test-time training (TTT) on scored text: all weights (chunk), adapters "
                            "(lora) or both", choices="none chunk lora phased", proof="PR 1855",
                            aliases={"TTT_ENABLED": {"1": "chunk lora phased", "0": "none"},
                                     "PHASED_TTT_ENABLED": {"1": "phased", "0": "none chunk lora"}})
    ttt_lr: float = setting(0.005, "eval", "TTT_MODE=chunk: SGD learning rate, which falls over the chunks by a half "
                            "cosine")
    ttt_momentum: float = setting(0.9, "eval", "TTT_MODE=chunk: SGD momentum", high=1.0)
    ttt_epochs: int = setting(3, "eval", "TTT_MODE=chunk: SGD steps on each chunk", low=1)
    ttt_chunk_tokens: int = setting(32768, "eval", "TTT_MODE=chunk: tokens that are scored before the model trains on "
                                    "them", low=1)
    ttt_batch_size: int = setting(64, "eval", "TTT adapters: documents in a batch, each with its own adapters", low=1)
    ttt_chunk_size: int | None = setting(None, "eval", "TTT adapters: tokens of a document that are scored before each "
                                         "step; auto: 48, or TTT_EVAL_SEQ_LEN if that is less", low=1)
    ttt_eval_seq_len: int | None = setting(None, "eval", "TTT adapters: most tokens of a document in a forward pass; "
                                           "auto: EVAL_SEQ_LEN", low=1)
    ttt_lora_rank: int = setting(80, "eval", "TTT adapters: rank (LoRA)", low=1, proof="PR 1855")
    ttt_lora_alpha: float = setting(144.0, "eval", "TTT adapters: their output is scaled by "
                                    "TTT_LORA_ALPHA/TTT_LORA_RANK")
    ttt_lora_lr: float = setting(1e-4, "eval", "TTT adapters: learning rate")
    ttt_warm_start_a: bool = setting(False, "eval", "TTT adapters: each TTT_WARM_START_DOCS documents begin with the "
                                   "mean of what A became in those before them")
    ttt_warm_start_docs: int = setting(16384, "eval", "TTT_WARM_START_A=1: documents that begin alike", low=1)
    ttt_local_lr_mult: float = setting(1.0, "eval", "TTT adapters: factor on TTT_LORA_LR")
    ttt_short_score_first_steps: str = setting("", "eval", "TTT adapters: chunks of short documents; 256:8,2000:24: 8 "
                                               "tokens up to 256, 24 up to 2000")
    ttt_optimizer: str = setting("adamw", "eval", "TTT adapters: optimizer", choices="adamw sgd",
                                 aliases={"TTT_OPTIMIZER": {"adam": "adamw"}})
    ttt_beta1: float = setting(0.0, "eval", "TTT adapters: AdamW beta 1", high=0.999999)
    ttt_beta2: float = setting(0.99, "eval", "TTT adapters: AdamW beta 2", high=0.999999, proof="PR 1855")
    ttt_weight_decay: float = setting(0.5, "eval", "TTT adapters: weight decay")
    ttt_q_lora: bool = setting(True, "eval", "TTT adapters: adapt the query matrices",
                               aliases={"TTT_MASK": {"no_qv": "0"}})
    ttt_k_lora: bool = setting(True, "eval", "TTT adapters: adapt the key matrices")
    ttt_v_lora: bool = setting(True, "eval", "TTT adapters: adapt the value matrices",
                               aliases={"TTT_MASK": {"no_qv": "0"}})
    ttt_o_lora: bool = setting(True, "eval", "TTT adapters: adapt attention's output")
    ttt_lora_o_input: str = setting("norm", "eval", "input of TTT_O_LORA's adapters; norm: the layer's normalised "
                                    "input; attention: the heads' output", choices="norm attention")
    ttt_mlp_lora: bool = setting(True, "eval", "TTT adapters: one beside each MLP")
    ttt_head_lora: bool = setting(True, "eval", "TTT adapters: adapt the output head")
    ttt_doc_order: str = setting("bucketed", "eval", "order of documents in TTT; bucketed: sorted by length within "
                                 "TTT_BUCKET_WINDOW documents", choices="sequential bucketed sorted")
    ttt_bucket_window: int = setting(4096, "eval", "TTT_DOC_ORDER=bucketed: documents sorted at a time", low=1)
    phased_ttt_prefix_docs: int = setting(10000, "eval", "TTT_MODE=phased: how many first documents the model's "
                                          "weights train on, once scored", low=1)
    phased_ttt_num_phases: int = setting(1, "eval", "TTT_MODE=phased: how often the weights train during the first "
                                         "PHASED_TTT_PREFIX_DOCS", low=1)
    global_ttt_lr: float = setting(1e-3, "eval", "TTT_MODE=phased: SGD learning rate of the weights, which falls by a "
                                   "half cosine")
    global_ttt_momentum: float = setting(0.9, "eval", "TTT_MODE=phased: SGD momentum of the weights", high=1.0)
    global_ttt_chunk_tokens: int = setting(32768, "eval", "TTT_MODE=phased: tokens of one SGD step of the weights",
                                           low=1)
    ngram_tilt_enabled: bool = setting(True, "eval", "n-gram tilt: raise the probability of the token that most often "
                                       "followed the same tokens", proof="PR 2135")
    token_order: str = setting("16,8,6,5,4,3", "eval", "n-gram tilt: tokens of an n-gram; several: of the longest "
                               "with a hint", proof="log")
    token_threshold: float = setting(0.8, "eval", "n-gram tilt: least share of a context's earlier occurrences that "
                                     "the raised token followed", low=0.01, high=1.0, proof="PR 2135")
    token_boost: float = setting(2.625, "eval", "n-gram tilt: number added to the logit of the raised token", high=20.0)
    hedge_enabled: bool = setting(True, "eval", "n-gram tilt: mix boosts from 0 to twice TOKEN_BOOST, weighted by "
                                  "what each has cost so far where the token was about as likely", proof="log")
    eval_stride: int | None = setting(None, "eval", "tokens between sliding evaluation windows; 0: no sliding "
                                      "evaluation; auto: 64, or 0 with adapters")
    eval_batch_tokens: int | None = setting(None, "eval", "most tokens of a forward pass in evaluation; auto: "
                                            "MICRO_BATCH_TOKENS", low=1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_range(f, getattr(self, f.name))
        n, length = self.num_layers, self.eval_seq_len or self.train_seq_len
        last = max(round(5 * n / 11), self.loop_start or 0) if self.loop_end is None else self.loop_end
        first = min(round(3 * n / 11), last) if self.loop_start is None else self.loop_start
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        run_id = self.run_id or f"{datetime.now():%Y%m%d-%H%M%S}-seed{self.seed}-{os.urandom(4).hex()}"
        marked = self.caseops_enabled
        if marked is None:
            usual = os.path.join(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}_caseops")
            marked = bool(glob.glob(os.path.join(glob.escape(self.data_path or usual), "fineweb_val_bytes_*.bin")))
        case = "_caseops" if marked else ""
        for name, value in {
            "caseops_enabled": marked, "loop_start": first, "loop_end": last,
            "ve_enabled": self.quant_allocation == "auto" and not self.qat_enabled,
            "ve_layers": ",".join(map(str, sorted({n * i // 6 for i in (1, 3, 5)}))),
            "parallel_start_layer": min(n, max(round(8 * n / 11), last + 1 if self.num_loops else 0)),
            "sparse_attn_gate_enabled": not (self.gated_attn_enabled or self.attn_out_gate_enabled),
            "eval_stride": 0 if self.ttt_mode in ("lora", "phased") else min(64, length),
            "run_id": run_id, "artifact_dir": os.path.join("logs", run_id),
            "data_path": os.path.join(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}{case}"),
            "tokenizer_path": os.path.join(self.data_dir, "tokenizers", f"fineweb_{self.vocab_size}_bpe{case}.model"),
            "average": "+".join(n for n, on in (("ema", self.ema_decay), ("swa", self.swa_enabled)) if on) or "ema",
            **dict.fromkeys(("attn_clip_sigmas", "mlp_clip_sigmas"), self.matrix_clip_sigmas),
            "eval_seq_len": self.train_seq_len, "ttt_eval_seq_len": length,
            "ttt_chunk_size": min(48, self.ttt_eval_seq_len or length),
        }.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.embedding_dim == self.model_dim:
            object.__setattr__(self, "embedding_dim", 0)
        if self.qat_enabled:  # it has the matrices trained on SDClip's grid
            object.__setattr__(self, "quant_allocation", "sdclip")
        check_contradictions(self, given)

    def ve_layer_list(self) -> list[int]:
        """VE_LAYERS as numbers; empty if it is not a list of different layers of the model."""
        layers = parse_numbers(self.ve_layers)
        return layers if set(layers) <= set(range(self.num_layers)) and len(set(layers)) == len(layers) else []

    def token_orders(self) -> list[int]:
        """TOKEN_ORDER as numbers; empty if it is not a list of different ones, the largest first."""
        orders = parse_numbers(self.token_order)
        return orders if orders == sorted({n for n in orders if 2 <= n <= 64}, reverse=True) else []

    def loop_stages(self) -> list[tuple[float, int]]:
        """(from when, loops) in order, of LOOP_SCHEDULE or ENABLE_LOOPING_AT; empty if it does not end in NUM_LOOPS."""
        text = self.loop_schedule or f"{self.enable_looping_at:.17g}:{self.num_loops}"
        stages = [(float(at), int(loops)) for at, loops in parse_pairs(text, r"\d*\.?\d+(?:e[-+]\d\d)?|\d+\.")]
        fits = stages and stages[-1][1] == self.num_loops == max(loops for _, loops in stages)
        ordered = all(a < b or (a > 1) != (b > 1) for (a, _), (b, _) in itertools.combinations(stages, 2))
        return stages if fits and ordered and self.num_loops else []

    def seq_stages(self) -> list[tuple[float, int]]:
        """(from when, window) in order, of TRAIN_SEQ_SCHEDULE, none over TRAIN_SEQ_LEN; empty if it is no such list."""
        text = "" if self.train_seq_schedule == "0" else self.train_seq_schedule
        found = [(int(length), float(until)) for length, until in parse_pairs(text, right=r"\d*\.?\d+", between="@")]
        ends, lengths = [0.0, *(until for _, until in found)], [*(length for length, _ in found), self.train_seq_len]
        fits = bool(found) == bool(text) and min(lengths) > 1 and all(a < b <= 1 for a, b in itertools.pairwise(ends))
        return [(at, min(length, self.train_seq_len)) for at, length in zip(ends, lengths) if at < 1] if fits else []

    def ttt_chunks(self) -> list[tuple[float, int]]:
        """(longest document, tokens of its chunks), ascending, then of all others; empty if it is no such list."""
        text = "" if self.ttt_short_score_first_steps == "0" else self.ttt_short_score_first_steps
        found, usual = [(int(longest), int(chunk)) for longest, chunk in parse_pairs(text)], self.ttt_chunk_size
        fits = bool(found) == bool(text) and found == sorted(found) and all(chunk for _, chunk in found)
        return [*((longest, min(chunk, usual)) for longest, chunk in found), (math.inf, usual)] if fits else []

    @property
    def bounded(self) -> bool:
        """Whether attention may end inside a row."""
        return self.varlen_enabled or any(window < self.train_seq_len for _, window in self.seq_stages())

    @property
    def row_tokens(self) -> int:
        """Tokens of one row of a batch: a training window, or with VARLEN up to 8 in a row that hold documents.

        Rows are drawn from all over the shards. Where windows are few a row is one of them: a step that reads fewer
        than MIN_ROWS places sees too few documents (docs/log.md has what that costs).
        """
        if not self.varlen_enabled:
            return self.train_seq_len
        windows, most = self.train_batch_tokens // self.train_seq_len, (self.micro_batch_tokens or self.train_seq_len)
        longest = min(8, windows // MIN_ROWS, most // self.train_seq_len)
        return self.train_seq_len * max((n for n in range(2, longest + 1) if windows % n == 0), default=1)

    @classmethod
    def group(cls, *names: str) -> list[str]:
        """Names of the fields in these groups, in order."""
        return [f.name for f in dataclasses.fields(cls) if f.metadata["group"] in names]


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks
#
# In: tensors of one layer or of the head, tokens. Out: causal attention inside documents or rows, norms, activations,
# losses, and what a token takes over from the one before it, in plain PyTorch, which torch.compile fuses.


IGNORE = -100  # target of a position that is not scored
NORM_EPS = 1e-6  # under the root of every norm


class Bounds(NamedTuple):
    """Documents packed into one flat sequence of N = B*T tokens: attention stays inside [cu[i], cu[i+1])."""

    cu_seqlens: Tensor  # (documents + 1,) int32, from 0 to N
    segment: Tensor  # (N,) int32: which document a token belongs to
    max_len: int  # no document is longer

    @classmethod
    def find(cls, ids: Tensor, bos: int, max_len: int) -> "Bounds":
        """Bounds of ids (B, T): a document starts at each `bos`, at each row, and after every `max_len` tokens.

        cu_seqlens is filled up with N, documents of no tokens, to a length that hardly ever changes: a compiled graph
        is made for one length. The room is twice what web text needs (a document of FineWeb has 960 tokens, windows cut
        some more), not ten times: FlashAttention 3 makes room for a block of queries in every document that might be.
        """
        starts = ids == bos
        starts[:, 0] = True
        flat = [*starts.flatten().nonzero().flatten().tolist(), ids.numel()]
        cuts = [c for a, b in itertools.pairwise(flat) for c in range(a, b, max_len)]
        room = max(64, ids.numel() // 256)
        while room <= len(cuts):
            room *= 2
        cu = torch.tensor(cuts + [ids.numel()] * (room + 1 - len(cuts)), dtype=torch.int32, device=ids.device)
        segment = torch.repeat_interleave(torch.arange(room, dtype=torch.int32, device=ids.device), cu.diff().long())
        return cls(cu, segment, max_len)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None) -> Tensor:
    """Causal attention with grouped heads: q (B, T, H, dh), k and v (B, T, Hkv, dh) -> (B, T, H, dh). Plain PyTorch.

    With bounds, the flat sequence is cut into blocks of max_len: a query's document starts in its own block or the one
    before, so each block attends to two, under a mask of equal segments. Shapes do not depend on the documents. Where
    a block is a row, which starts a document, it attends to itself alone.
    """
    if bounds is None:
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                           enable_gqa=q.size(2) != k.size(2))
        return y.transpose(1, 2)
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))  # fast kernels take mask or groups
    total, size = q.size(0) * q.size(1), bounds.max_len
    pad, reach = -total % size, 1 if q.size(1) == size else 2  # blocks that a block attends to

    def blocks(x: Tensor, reach: int) -> Tensor:  # (total, heads, dh) -> (blocks, heads, reach * size, dh)
        x = F.pad(x, (0, 0, 0, 0, (reach - 1) * size, pad)).unflatten(0, (-1, size))
        return (x if reach == 1 else torch.cat((x[:-1], x[1:]), dim=1)).transpose(1, 2)

    segment = blocks(bounds.segment[:, None, None] + 1, reach)  # 0: before the first token, and padding
    place = torch.arange(reach * size, device=q.device)
    mask = (segment[:, :, -size:] == segment.mT) & (place <= place[-size:, None])
    shape, (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
    y = F.scaled_dot_product_attention(blocks(q, 1), blocks(k, reach), blocks(v, reach), attn_mask=mask)
    return y.transpose(1, 2).flatten(0, 1)[:total].view(shape)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension; no learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def norm_rotate(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x (B, T, heads, dh) normed, times their gain, the first dims rotated by position (half-split pairs).

    cos and sin (T, r/2); gain (heads,), None is 1; all of one dtype. In a form that torch.compile takes in one pass:
    nothing is cut up and put together, and what backward needs is x.
    """
    x, half = rms_norm(x), cos.size(-1)
    x = x if gain is None else x * gain[:, None]
    if not half:
        return x
    rest = x.size(-1) - 2 * half
    partner = F.pad(x[..., : 2 * half].unflatten(-1, (2, half)).flip(-2).flatten(-2), (0, rest))
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
    return x * F.pad(cos, (0, rest), value=1.0)[:, None] + partner * F.pad(sin, (0, rest))[:, None]


def offset_keys(k: Tensor, starts: Tensor, first: int) -> Tensor:
    """Keys (B, T, heads, dh) whose dims from `first` on are those of the token before, but where a span of attention
    `starts` (B, T): one layer then finds what followed a token like the query's (modded-nanogpt PR 169).
    """
    own = starts[..., None, None] | (torch.arange(k.size(-1), device=k.device) < first)
    return torch.where(own, k, F.pad(k, (0, 0, 0, 0, 1, 0))[:, :-1])


def exclude_self(y: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """XSA (PR 478): y (B, T, H, dh) less its component along this position's own value, v (B, T, Hkv, dh); then times
    a gate (B, T, H), None is 1.
    """
    v = F.normalize(v, dim=-1)[:, :, :, None]  # one value per group of query heads
    y = y.unflatten(2, (v.size(2), -1))
    y = (y - (y * v).sum(-1, keepdim=True) * v).flatten(2, 3)
    return y if gate is None else y * gate[..., None]


def squared_leaky_relu(h: Tensor) -> Tensor:
    """LeakyReLU(0.5)² (PR 493)."""
    return F.leaky_relu(h, 0.5).square()


def document_starts(ids: Tensor, bos: int) -> Tensor:
    """(B, T) bool: tokens with no token before them in their row or document. Attention may be cut elsewhere too."""
    return F.pad(ids[:, 1:] == bos, (1, 0), value=True)


def span_starts(ids: Tensor, bounds: Bounds | None) -> Tensor:
    """(B, T) bool: tokens of ids (B, T) from which attention reaches no further back."""
    if bounds is None:
        return F.pad(torch.zeros_like(ids[:, 1:], dtype=torch.bool), (1, 0), value=True)
    return F.pad(bounds.segment.diff() != 0, (1, 0), value=True).view_as(ids)


def previous(x: Tensor, starts: Tensor) -> Tensor:
    """x (B, T, d) of the token before; 0 at a document's start, or the one before it would leak in (PR 1851)."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1].masked_fill(starts[..., None], 0.0)


def bigram_bucket(ids: Tensor, starts: Tensor, buckets: int) -> Tensor:
    """(B, T) int32 hash of each token and the one before it; the last bucket where there is none (PR 162)."""
    tokens = ids.int()
    pair = (36313 * tokens) ^ (27191 * F.pad(tokens, (1, 0))[:, :-1])
    return torch.where(starts, buckets - 1, pair % (buckets - 1))


def sign_table(dim: int) -> Tensor:
    """(8192, dim) int8 of 1 and -1, to be chosen by (token before xor token) mod 8192: pairs of tokens that share a row
    of the bigram embedding then do not add up in it (modded-nanogpt's record 83). A hash, the same on every machine.
    """
    mixed = torch.arange(8192 * dim) * 0x9E3779B1 % 2**32
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        mixed = (mixed ^ mixed >> 15) * factor % 2**32
    return (1 - 2 * (mixed >> 31)).to(torch.int8).view(8192, dim)


def softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits.float() / cap)


def cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Losses (B, T) fp32 in nats of targets (B, T) under logits (B, T, V) softly capped; 0 where IGNORE."""
    losses = F.cross_entropy(softcap(logits, cap).flatten(0, 1), targets.flatten(), reduction="none",
                             ignore_index=IGNORE)
    return losses.view_as(targets)


class Ops(NamedTuple):
    """What kernels may do in a forward pass. None: linear() by linear(), as under any hook."""

    # x (B, T, d), up (hidden, d), down (d, hidden) -> (B, T, d)
    mlp: Callable | None = None
    # x (B, T, d), weight (V, d), targets (B, T), cap -> losses as cross_entropy() has them
    head_losses: Callable | None = None


PLAIN = Ops()


# ----------------------------------------------------------------------------------------------------------------------
# Projections
#
# In: activations and a weight matrix or table. Out: their product. Adapters, statistics for quantization and rounded
# weights ride on it here, and nowhere else.


class Site(NamedTuple):
    """One use of one weight matrix: its role, its physical layer, and which visit of that layer this is."""

    role: str  # q, k, v, o, up, down, head, ...; attn, mlp: a whole half, which only an adapter stands beside
    layer: int = -1  # -1: outside the layers
    visit: int = 0


class Adapter(NamedTuple):
    """A low-rank addition to one projection, one per row of the batch: y += scale * (x Aᵀ) Bᵀ."""

    a: Tensor  # (batch, rank, in)
    b: Tensor  # (batch, out, rank)
    scale: float


class Hooks(NamedTuple):
    """What may ride on a linear projection. All off: a plain matrix product and nothing else.

    Those of one layer, by at(), have roles for sites and no layers in their shapes: all layers share a compiled graph.
    """

    adapters: dict[Site, Adapter] | None = None
    hessians: dict[str, Tensor] | None = None  # role -> (layers, in, in) fp32; sums of x xᵀ are added in place
    moments: dict[str, Tensor] | None = None  # role -> (layers, out) fp32: sums of squares of the gradients of x Wᵀ
    fake_quant: Callable[[Tensor, Site], Tensor] | None = None

    def at(self, layer: int = -1, visit: int = 0) -> "Hooks":
        """Those of one visit of a layer, or of what is outside the layers."""
        adapters, *sums, fake_quant = self
        return Hooks(
            adapters and {site.role: a for site, a in adapters.items() if site[1:] == (layer, visit)},
            *(s and {role: of[layer] for role, of in s.items() if layer < len(of)} for s in sums),
            fake_quant and (lambda weight, role: fake_quant(weight, Site(role, layer, visit))))


NO_HOOKS = Hooks()


def collect_hessian(x: Tensor, role: str, hooks: Hooks) -> None:
    """Add Σ x xᵀ over the rows of x (..., in) to the Hessian of this role, if one is collected."""
    if hooks.hessians is not None and role in hooks.hessians:
        rows = x.detach().flatten(0, -2).float()
        hooks.hessians[role].addmm_(rows.T, rows)


def collect_moments(y: Tensor, role: str, hooks: Hooks, ids: Tensor | None = None) -> None:
    """Have the squared gradients of y (..., out) added to the moments of this role, if they are collected: by output,
    or for rows of a table by `ids` (...), of the average element.
    """
    def add(gradient: Tensor) -> None:
        square = gradient.detach().float().square()
        if ids is None:
            hooks.moments[role].add_(square.flatten(0, -2).sum(0))
        else:
            hooks.moments[role].index_add_(0, ids.flatten(), square.mean(-1).flatten())

    if hooks.moments is not None and role in hooks.moments:
        y.register_hook(add)


def linear(x: Tensor, weight: Tensor, role: str, hooks: Hooks) -> Tensor:
    """x (..., in) times weight (out, in) -> (..., out). The one place where a weight matrix meets activations."""
    collect_hessian(x, role, hooks)
    if hooks.fake_quant is not None:
        weight = hooks.fake_quant(weight, role)
    y = F.linear(x, weight.to(x.dtype))
    collect_moments(y, role, hooks)
    return adapt(y, x, role, hooks)


def adapt(y: Tensor, x: Tensor, role: str, hooks: Hooks) -> Tensor:
    """y (B, T, out) plus what the adapter of this role, if there is one, makes of x (B, T, in)."""
    if hooks.adapters is None or role not in hooks.adapters:
        return y
    a, b, scale = hooks.adapters[role]
    return y + scale * ((x @ a.mT.to(x.dtype)) @ b.mT.to(x.dtype))


def lookup(table: Tensor, ids: Tensor, role: str, hooks: Hooks, dtype: torch.dtype) -> Tensor:
    """Rows of table (rows, dim) by ids (B, T) -> (B, T, dim) in `dtype`. The one place where a table is read."""
    if hooks.fake_quant is not None:
        table = hooks.fake_quant(table, role)
    y = F.embedding(ids, table).to(dtype)
    collect_moments(y, role, hooks, ids)
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Model
#
# In: tokens, and where documents begin. Out: losses or logits, by one forward pass for training, calibration,
# evaluation and test-time training; weights stand in banks, of which each virtual layer gets its slices.


def rotary_table(cfg: Settings, ids: Tensor, bounds: Bounds | None) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, r/2) fp32, of position in rows ids (B, T) times base^(-2i/r), r = ROPE_DIMS.

    ROPE_YARN stretches the base where attention spans more than TRAIN_SEQ_LEN tokens: by (span / trained)^(r/(r-2)).
    """
    dims, base, length, device = cfg.rope_dims, cfg.rope_base, ids.size(1), ids.device
    span = bounds.max_len if bounds else length
    if cfg.rope_yarn and span > cfg.train_seq_len:
        base *= (span / cfg.train_seq_len) ** (dims / (dims - 2))
    # in float64: only differences of positions count, also far along a row of packed documents
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=device) / max(dims, 1))
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def virtual_layers(cfg: Settings, loops: int) -> list[tuple[int, int]]:
    """(physical layer, visit) in running order: LOOP_START..LOOP_END run `loops` times more, in a row (PR 1204)."""
    if not loops:
        return [(layer, 0) for layer in range(cfg.num_layers)]
    looped = range(cfg.loop_start, cfg.loop_end + 1)
    return [*((layer, 0) for layer in range(cfg.loop_start)),
            *((layer, visit) for visit in range(loops + 1) for layer in looped),
            *((layer, 0) for layer in range(cfg.loop_end + 1, cfg.num_layers))]


class Shared(NamedTuple):
    """What all layers of one forward pass share."""

    x0: Tensor  # (B, T, d) normed input
    rope: list[Tensor]  # cos and sin, as rotary_table's
    bounds: Bounds | None
    starts: Tensor | None  # (B, T) bool: tokens that no attention reaches back from, where keys are offset


class Layer(NamedTuple):
    """What a virtual layer has: its slices of the parameters, by name, and what it is."""

    weights: dict[str, Tensor]  # only those that it has a share of
    xsa: bool
    parallel: bool


class GPT(nn.Module):
    """The language model. Matrices of one role live in one 3-D bank, vectors of one kind in one stacked parameter.

    A technique that is off has no parameters. `trained` says for each parameter what trains it: matrix (Muon),
    embedding, head or scalar (AdamW, each with its own rates).
    """

    def __init__(self, cfg: Settings, attend: Callable = attend_sdpa, dtype: torch.dtype = torch.float32, bos: int = -1,
                 ops: Ops = PLAIN):
        """Weights are fp32; activations and matrix products are of `dtype`; `bos` is the id that opens a document."""
        super().__init__()
        self.cfg, self.attend, self.dtype, self.bos, self.ops = cfg, attend, dtype, bos, ops
        self.trained: dict[str, str] = {}
        self.slices: dict[str, tuple[str, str, int]] = {}  # name in a layer -> parameter, what is counted, the first
        self.ve_layers = cfg.ve_layer_list() if cfg.ve_enabled else []
        layers, d, kv = cfg.num_layers, cfg.model_dim, cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads)
        hidden, new = int(cfg.mlp_mult * d), self.new
        new("tok_emb", torch.randn(cfg.vocab_size, cfg.embedding_dim or d) * cfg.tied_embed_init_std, "embedding")
        new("qo_bank", torch.cat((orthogonal(layers, d, d), torch.zeros(layers, d, d))), "matrix", "layer", "q o")
        new("kv_bank", orthogonal(2 * layers, kv, d), "matrix", "layer", "k v")
        new("mlp_up_bank", orthogonal(layers, hidden, d), "matrix", "layer", "up")
        new("mlp_down_bank", torch.zeros(layers, d, hidden), "matrix", "layer", "down")
        new("resid_mix", torch.tensor([1.0, 0.0])[None, :, None].repeat(layers, 1, d), "scalar", "layer")
        new("attn_scale", torch.ones(layers, d), "scalar", "layer")
        new("mlp_scale", torch.ones(layers, d), "scalar", "layer")
        new("q_gain", torch.full((layers, cfg.num_heads), cfg.qk_gain_init), "scalar", "layer")
        self.add_techniques(kv)
        self.register_buffer("is_pair", None, persistent=False)  # (V,) bool: ids that stand for two tokens
        if cfg.ln_scale:  # a tensor: of numbers, torch.compile would make a graph for each layer
            self.register_buffer("norm_scale", torch.arange(1, layers + 1) ** -0.5, persistent=False)
            self.slices["norm_scale"] = ("norm_scale", "layer", 0)

    def new(self, name: str, value: Tensor, trained: str, cut: str = "", roles: str = "") -> None:
        """Add a parameter; `trained` says by what. `cut`: what its first dimension counts, a key of slice_layer's
        `index`, if layers have slices of it. A bank of several `roles` holds all slices of the first role first.
        """
        self.register_parameter(name, nn.Parameter(value))
        self.trained[name] = trained
        if cut:
            names = (roles or name).split()
            self.slices |= {role: (name, cut, i * self.cfg.num_layers) for i, role in enumerate(names)}

    @torch.no_grad()
    def fuse(self, pairs: Sequence[list[int]]) -> None:
        """Have ids stand for two tokens, each as [id, piece, marker]; their rows begin as a mixture (PR 2109)."""
        ids, piece, marker = torch.tensor(pairs, device=self.tok_emb.device).T
        rows, norm = 0.4 * self.tok_emb[piece] + 0.6 * self.tok_emb[marker], self.tok_emb.norm(dim=1).mean()
        self.tok_emb[ids] = norm * F.normalize(rows, dim=1)
        self.is_pair = torch.zeros(len(self.tok_emb), dtype=torch.bool, device=ids.device).index_fill(0, ids, True)

    def add_techniques(self, kv: int) -> None:
        """The parameters of what can be off. `kv`: the width of keys and of values, all heads together."""
        cfg, d, new, loops = self.cfg, self.cfg.model_dim, self.new, self.cfg.num_loops
        skips, parallel = len(virtual_layers(cfg, loops)) // 2, cfg.num_layers - cfg.parallel_start_layer
        if skips:
            new("skip_weight", torch.ones(skips, d), "scalar", "decoder step")
        if skips and cfg.skip_gates_enabled:
            new("skip_gate", torch.zeros(skips, d), "scalar", "decoder step")
        if cfg.embedding_dim:
            new("embed_in_bank", orthogonal(1, d, cfg.embedding_dim), "matrix")
            new("embed_out_bank", orthogonal(1, cfg.embedding_dim, d), "matrix")
        if not cfg.tie_embeddings:
            new("head", torch.zeros_like(self.tok_emb), "head")
        if cfg.recur_blend != "none" and loops:
            init = {"alpha": [cfg.recur_alpha_init], "ab": [cfg.recur_a_init, cfg.recur_b_init], "gate": [4.0]}
            looped = cfg.loop_end - cfg.loop_start + 1
            new("recur_blend", torch.tensor(init[cfg.recur_blend]).repeat(loops, looped, 1), "scalar", "revisit")
        if cfg.parallel_mode == "lanes" and parallel > 0:
            new("lane_mix", torch.tensor(0.5), "scalar")
        elif cfg.parallel_mode == "crossed" and parallel > 0:
            new("lane_keep", torch.full((parallel, 2), 1.1), "scalar", "parallel layer")
            new("lane_write", torch.ones(parallel, 2, 2), "scalar", "parallel layer")
        if cfg.bigram_vocab_size:
            new("bigram_table", torch.zeros(cfg.bigram_vocab_size, cfg.bigram_dim), "embedding")
            new("bigram_bank", orthogonal(1, d, cfg.bigram_dim), "matrix")
            new("bigram_scale", torch.tensor(0.05), "scalar")
            self.register_buffer("signs", sign_table(cfg.bigram_dim) if cfg.bigram_signs else None, persistent=False)
        if cfg.smear_gate_enabled and cfg.smear_gate_mode == "input":
            new("smear_weight", torch.zeros(1, cfg.gate_window), "scalar")
            new("smear_scale", torch.tensor(0.0), "scalar")
        elif cfg.smear_gate_enabled:
            new("smear_theta", torch.zeros(d), "scalar")
        if cfg.ve_enabled:  # a table for each layer: modded-nanogpt, nanochat
            width = cfg.ve_dim or kv * len(self.ve_layers)
            new("ve_table", torch.randn(cfg.vocab_size, width) * 0.01, "embedding")
            if cfg.ve_bigram_rows:
                new("ve_bigram_table", torch.randn(cfg.ve_bigram_rows, width) * 0.01, "embedding")
                self.register_buffer("ve_signs", sign_table(width), persistent=False)
            if cfg.ve_dim:  # one for all: PR 374
                new("ve_bank", orthogonal(1, kv, cfg.ve_dim), "matrix")
                new("ve_scale", torch.tensor(0.1), "scalar")
            new("ve_layer_scale", torch.ones(len(self.ve_layers)), "scalar", "value layer")
            self.slices["values"] = ("values", "value layer", 0)
        if cfg.gated_attn_enabled:
            new("attn_gate", torch.randn(cfg.num_layers, cfg.num_heads, d) * 0.01, "scalar", "layer")
        elif cfg.sparse_attn_gate_enabled or cfg.attn_out_gate_enabled:
            new("attn_gate", torch.zeros(cfg.num_layers, cfg.num_heads, cfg.gate_window), "scalar", "layer")

    def forward(self, ids: Tensor, targets: Tensor | None = None, bounds: Bounds | None = None,
                hooks: Hooks = NO_HOOKS, loops: int | None = None, rope: tuple[Tensor, Tensor] | None = None,
                parts: list[Callable] | None = None) -> Tensor:
        """Losses fp32 in nats of targets (B, T), 0 where IGNORE; without targets, logits (B, T, V) fp32.

        Targets (n, B, T) are several tokens at each place, of which the first, alone, gets a gradient, and where it is
        IGNORE the others are too.

        ids (B, T) int64. `bounds` keeps attention inside documents of the flattened batch. `loops` is how often the
        looped layers run again; None: NUM_LOOPS. `rope`: rotary_table() of these; None: made here. `parts`: compiled
        forms of embed, layer and predict.
        """
        embed, run_layer, predict = parts or (self.embed, self.layer, self.predict)
        rope = rope or rotary_table(self.cfg, ids, bounds)
        x, values = embed(ids, hooks.at())
        starts = span_starts(ids, bounds) if self.cfg.key_offset else None
        shared = Shared(x.view_as(x), [t.to(x.dtype) for t in rope], bounds, starts)
        order = virtual_layers(self.cfg, self.cfg.num_loops if loops is None else loops)
        half, skips, lane, outputs = len(order) // 2, [], None, {}
        stacks = dict([*self.named_parameters(), *self.named_buffers()])
        stacks |= {name: bank.unbind(0) for name, bank in self.params_of("matrix").items()}  # gradients in one piece
        if values is not None:  # VE_DIM: the same for each of its layers
            stacks["values"] = values.split(self.kv_bank.size(1), -1) * (len(self.ve_layers) if self.cfg.ve_dim else 1)
        for n, (layer, visit) in enumerate(order):
            skip = skips.pop() if n >= half and skips else None
            params = self.slice_layer(stacks, layer, visit, None if skip is None else n - half)
            last = outputs[layer] if "recur_blend" in params.weights else None
            x, lane = run_layer(x, lane, skip, last, params, shared, hooks.at(layer, visit))
            if self.cfg.recur_blend != "none":
                outputs[layer] = x
            if n < half:  # one tensor as two inputs would be a graph of its own, so here and above it is another
                skips.append(x.view_as(x))
        return predict(x, lane, targets, hooks.at())

    def slice_layer(self, stacks: dict[str, Any], layer: int, visit: int, step: int | None) -> Layer:
        """A virtual layer's slices of the parameters. `step`: of the decoder, where a skip ends; else None."""
        cfg = self.cfg
        index = {  # of this layer's slice; None where it has none
            "layer": layer, "decoder step": step,
            "parallel layer": layer - cfg.parallel_start_layer if layer >= cfg.parallel_start_layer else None,
            "value layer": self.ve_layers.index(layer) if layer in self.ve_layers else None,
            "revisit": (visit - 1, layer - cfg.loop_start) if visit else None}
        weights = {role: stacks[name][index[cut] + first if first else index[cut]]
                   for role, (name, cut, first) in self.slices.items() if index[cut] is not None}
        return Layer(weights, layer >= cfg.num_layers - cfg.xsa_last_n, layer >= cfg.parallel_start_layer)

    def embed(self, ids: Tensor, hooks: Hooks) -> tuple[Tensor, Tensor | None]:
        """Normed input x0 (B, T, d) and, if enabled, the value embedding of ids (B, T): (B, T, Hkv dh), or with
        VE_DIM=0 those of all VE_LAYERS side by side.
        """
        cfg, starts = self.cfg, document_starts(ids, self.bos)
        x = lookup(self.tok_emb, ids, "emb", hooks, self.dtype)
        if cfg.embedding_dim:
            x = linear(x, self.embed_in_bank[0], "embed_in", hooks)
        if cfg.bigram_vocab_size:  # PR 162
            y = self.bigrams("bigram_table", self.signs, ids, starts, hooks)
            x = x + self.bigram_scale.to(x.dtype) * linear(y, self.bigram_bank[0], "bigram", hooks)
        smear = cfg.smear_gate_mode if cfg.smear_gate_enabled else None
        if smear == "input":  # PR 1667
            gate = torch.sigmoid(linear(x[..., : cfg.gate_window], self.smear_weight, "smear", hooks))
            x = x + self.smear_scale.to(x.dtype) * self.shut(gate, ids, starts) * previous(x, starts)
        x = rms_norm(x)
        if smear == "vector":  # PR 65
            gate = torch.sigmoid(self.smear_theta).to(x.dtype)
            x = torch.lerp(x, previous(x, starts), self.shut(gate, ids, starts))
        if not cfg.ve_enabled:
            return x, None
        values = lookup(self.ve_table, ids, "ve_table", hooks, self.dtype)
        if cfg.ve_bigram_rows:
            values = values + self.bigrams("ve_bigram_table", self.ve_signs, ids, starts, hooks)
        if not cfg.ve_dim:
            return x, values
        return x, self.ve_scale.to(x.dtype) * linear(values, self.ve_bank[0], "ve", hooks)

    def bigrams(self, name: str, signs: Tensor | None, ids: Tensor, starts: Tensor, hooks: Hooks) -> Tensor:
        """Rows (B, T, dim) of a table for each token and the one before it, by hash; with `signs`, times the pair's."""
        table = getattr(self, name)
        rows = lookup(table, bigram_bucket(ids, starts, len(table)), name, hooks, self.dtype)
        if signs is None:
            return rows
        return rows * signs[(ids ^ previous(ids[..., None], starts)[..., 0]) % len(signs)]

    def shut(self, gate: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
        """A smear gate, 0 where the token before stands for two (PR 2109): ids, starts (B, T)."""
        if self.is_pair is None:
            return gate
        return gate.masked_fill(previous(self.is_pair[ids][..., None], starts), 0.0)

    def predict(self, x: Tensor, lane: Tensor | None, targets: Tensor | None, hooks: Hooks) -> Tensor:
        """Losses, or logits without targets, from the last residual stream x (B, T, d) and its other lane, if any."""
        if lane is not None and self.cfg.parallel_mode == "lanes":
            x = torch.lerp(lane, x, self.lane_mix.to(x.dtype))
        elif lane is not None:
            x = {"mean": 0.5 * (x + lane), "attn": x, "mlp": lane}[self.cfg.parallel_final_lane]
        x = rms_norm(x)
        if self.cfg.embedding_dim:
            x = linear(x, self.embed_out_bank[0], "embed_out", hooks)
        if hooks.hessians is not None and targets is None:  # calibration: what the head reads, not what it says
            collect_hessian(x, "head", hooks)
            return x
        weight, cap = self.tok_emb if self.cfg.tie_embeddings else self.head, self.cfg.logit_softcap
        if self.ops.head_losses and targets is not None and targets.ndim == 2 and not any(hooks):
            return self.ops.head_losses(x, weight.to(x.dtype), targets, cap)
        logits = linear(x, weight, "head", hooks)
        if targets is None:
            return softcap(logits, cap)
        first, *others = targets if targets.ndim == 3 else [targets]
        losses = cross_entropy(logits, first, cap)
        if not others:
            return losses
        z, *rest = (softcap(logits.detach().gather(-1, t.clamp(min=0)[..., None]), cap)[..., 0] for t in targets)
        # at one place the losses of two tokens differ by their logits alone
        return torch.stack([losses, *((losses.detach() + (z - y)) * (t != IGNORE) for y, t in zip(rest, others))])

    def layer(self, x: Tensor, lane: Tensor | None, skip: Tensor | None, last: Tensor | None, params: Layer,
              shared: Shared, hooks: Hooks) -> tuple[Tensor, Tensor | None]:
        """One virtual layer on the residual stream x (B, T, d), and on the other lane if there are two.

        Into x first comes the U-Net skip (PR 289) that ends here, if one does; into the output of a revisited layer, by
        RECUR_BLEND, `last`, its output at the visit before.
        """
        before, w = x, params.weights
        if skip is not None:
            skip = w["skip_weight"].to(x.dtype) * skip
            gate = w.get("skip_gate")
            x = x + skip if gate is None else torch.lerp(skip, x, torch.sigmoid(gate).to(x.dtype))
        if params.parallel and self.cfg.parallel_mode != "gptj":
            if lane is None:  # crossed: no skip reaches lane 1
                lane = x if self.cfg.parallel_mode == "lanes" else before
            return self.lanes(x, lane, params, shared, hooks)
        u = mix(x, shared.x0, *w["resid_mix"])
        n = self.norm(u, params)
        y = mix(u, self.attention_half(n, params, shared, hooks), None, w["attn_scale"])
        if not params.parallel:  # else the MLP reads what attention reads (GPT-J; PR 1412)
            n = self.norm(y, params)
        y = mix(y, self.mlp_half(n, params, hooks), None, w["mlp_scale"])
        if "recur_blend" not in w:
            return y, None
        weight = w["recur_blend"].to(x.dtype)
        if self.cfg.recur_blend == "ab":  # PR 1894
            return weight[0] * y + weight[1] * last, None
        return torch.lerp(x, y, weight[0] if self.cfg.recur_blend == "alpha" else torch.sigmoid(weight[0])), None

    def lanes(self, lane0: Tensor, lane1: Tensor, params: Layer, shared: Shared, hooks: Hooks
              ) -> tuple[Tensor, Tensor]:
        """One parallel layer on two streams: attention reads lane 0, the MLP lane 1 (PR 1523; crossed: PR 1529)."""
        w = params.weights
        u = mix(lane0, shared.x0, *w["resid_mix"])
        a = w["attn_scale"].to(u.dtype) * self.attention_half(self.norm(u, params), params, shared, hooks)
        m = w["mlp_scale"].to(u.dtype) * self.mlp_half(self.norm(lane1, params), params, hooks)
        if self.cfg.parallel_mode == "lanes":
            return u + a, lane1 + m
        keep, add = w["lane_keep"].to(a.dtype), w["lane_write"].to(a.dtype)
        return (keep[0] * lane0 + add[0, 0] * a + add[1, 0] * m,
                keep[1] * lane1 + add[0, 1] * a + add[1, 1] * m)

    def attention_half(self, n: Tensor, params: Layer, shared: Shared, hooks: Hooks) -> Tensor:
        """Attention on the normed stream n (B, T, d)."""
        cfg, w = self.cfg, params.weights
        q, k, v = (linear(n, w[role], role, hooks) for role in "qkv")
        if "values" in w:
            v = v + w["ve_layer_scale"].to(v.dtype) * w["values"]
        q, k, v = (x.unflatten(-1, (-1, cfg.model_dim // cfg.num_heads)) for x in (q, k, v))
        q = norm_rotate(q, w["q_gain"].to(q.dtype), *shared.rope)
        k = norm_rotate(k, None, *shared.rope)
        if cfg.key_offset:
            k = offset_keys(k, shared.starts, cfg.rope_dims)
        y, gate = self.attend(q, k, v, shared.bounds), None
        if "attn_gate" in w:
            gate = linear(n if cfg.gated_attn_enabled else n[..., : cfg.gate_window], w["attn_gate"], "gate", hooks)
            if cfg.sparse_attn_gate_enabled:  # PR 1787
                gate = cfg.sparse_attn_gate_scale * gate
            gate = torch.sigmoid(gate) * (2.0 if cfg.attn_out_gate_enabled else 1.0)  # PR 1667; arXiv 2505.06708
        if params.xsa:
            y = exclude_self(y, v, gate)
        elif gate is not None:
            y = y * gate[..., None]
        return adapt(linear(y.flatten(2), w["o"], "o", hooks), n, "attn", hooks)

    def mlp_half(self, n: Tensor, params: Layer, hooks: Hooks) -> Tensor:
        """The MLP on the normed stream n (B, T, d)."""
        up, down = params.weights["up"], params.weights["down"]
        if self.ops.mlp and not any(hooks):
            return self.ops.mlp(n, up.to(n.dtype), down.to(n.dtype))
        y = linear(squared_leaky_relu(linear(n, up, "up", hooks)), down, "down", hooks)
        return adapt(y, n, "mlp", hooks)

    def norm(self, u: Tensor, params: Layer) -> Tensor:
        """What a half of this layer reads of the stream u."""
        scale = params.weights.get("norm_scale")
        return rms_norm(u) if scale is None else rms_norm(u) * scale.to(u.dtype)

    def params_of(self, *trained: str) -> dict[str, nn.Parameter]:
        """The parameters that are trained so."""
        return {name: p for name, p in self.named_parameters() if self.trained[name] in trained}


def mix(x: Tensor, z: Tensor, a: Tensor | None, b: Tensor) -> Tensor:
    """The stream a x + b z, None is 1: x, z (B, T, d); a, b (d,)."""
    return (x if a is None else a.to(x.dtype) * x) + b.to(x.dtype) * z


def orthogonal(count: int, rows: int, cols: int) -> Tensor:
    """(count, rows, cols) random matrices with orthonormal rows or columns, whichever are fewer."""
    return torch.stack([nn.init.orthogonal_(torch.empty(rows, cols)) for _ in range(count)])


def build_model(cfg: Settings, rt: "Runtime", attend: Callable, bos: int, ops: Ops = PLAIN,
                pairs: Sequence[list[int]] = ()) -> GPT:
    """The model with its initial weights from SEED, drawn on the CPU so that they do not depend on the device."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, attend, rt.dtype, bos, ops)
    if pairs:
        model.fuse(pairs)
    model.to(rt.device)
    for name, p in model.named_parameters():
        rt.share_(p.detach(), name)
    return model


def compile_model(model: GPT, backend: str | Callable = "inductor") -> tuple[Callable, Callable]:
    """The model's forward pass compiled whole, and the same by its parts, where layers of a kind share a graph.

    Whole it moves fewer bytes, but compiling takes a minute for each width of a batch, and test-time training has many.
    Parts are soon compiled, and from the second width on for any. The rotary table is made outside: inside, each kernel
    that reads it would work it out again, in float64.
    """
    torch._dynamo.config.recompile_limit = 256  # one function, many graphs: loops, QAT, widths, kinds of layers
    whole = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    parts = [torch.compile(part, fullgraph=True, backend=backend) for part in (model.embed, model.layer, model.predict)]

    def with_rope(forward: Callable, **fixed: Any) -> Callable:
        return lambda ids, targets=None, bounds=None, **options: forward(
            ids, targets, bounds, rope=rotary_table(model.cfg, ids, bounds), **fixed, **options)

    return with_rope(whole), with_rope(model, parts=parts)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels
#
# In: the machine, and what DTYPE, ATTENTION and FUSED ask for. Out: the number format, the fastest attention backend
# that works there, and with FUSED=1 Triton kernels in place of the plain forms that move more memory than need be
# (benchmarks/README.md).


HEAD_CHUNK = 2**24  # most logits that kernels make at a time: 34 MB in bf16, which Hopper's L2 holds


def attend_flash(dense: Callable, varlen: Callable) -> Callable:
    """FlashAttention's two entry points (versions 2 and 3 share them) behind our signature."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None) -> Tensor:
        if bounds is None:
            y = dense(q, k, v, causal=True)
            return y[0] if isinstance(y, tuple) else y
        cu, size = bounds.cu_seqlens, bounds.max_len  # from torch 2.13 on Dynamo takes no tensor twice: a view
        y = varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu, cu_seqlens_k=cu.view(-1),
                   max_seqlen_q=size, max_seqlen_k=size, causal=True)
        return (y[0] if isinstance(y, tuple) else y).view_as(q)

    return attend


def attend_torch_varlen(varlen_attn: Callable) -> Callable:
    """PyTorch's own variable-length flash attention; without bounds SDPA is already its fixed-length form."""
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None) -> Tensor:
        if bounds is None:
            return attend_sdpa(q, k, v, None)
        options = {"enable_gqa": True} if grouped else {}
        if not grouped:
            k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
        cu, size = bounds.cu_seqlens, bounds.max_len
        y = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu, cu, size, size, window_size=(-1, 0),
                        **options)
        return y.view_as(q)

    return attend


def flash_builds(package: str, repository: str) -> Iterator[tuple[Any, str]]:
    """FlashAttention's Python modules and where each comes from: the installed `package`, then from the newest on the
    versions of a prebuilt `repository` on the hub (from its cache once downloaded). ImportError where there is none.

    Since 2026-06 most builds on the hub are of PyTorch's stable ABI; `kernels` finds them from its version 0.16 on
    (huggingface/kernels-community PR 975 and 997). One that loads need not work (issue 1085 there).
    """
    with suppress(ImportError):
        yield importlib.import_module(package), package
    from kernels import get_kernel
    why = ""
    for version in (3, 2, 1):
        try:
            found = get_kernel(repository, version=version)
        except Exception as e:  # whatever the client raises: no network, no such version, no build for this machine
            why = why if "not found, available" in str(e) and why else str(e)
            continue
        yield found, f"{repository} version {version}"
    if why:
        raise ImportError(f"no prebuilt {repository}: {why}")


def attention_builds(name: str, device: torch.device) -> Iterator[tuple[Callable, str]]:
    """The builds of one backend by name, and where each comes from; ImportError when there is none, or no other."""
    if name == "fa3" and torch.cuda.get_device_capability(device)[0] != 9:
        raise ImportError("needs a Hopper GPU")
    if name in ("fa3", "fa2"):
        for fa, source in flash_builds(*(("flash_attn_interface", "kernels-community/flash-attn3") if name == "fa3" else
                                         ("flash_attn", "kernels-community/flash-attn2"))):
            yield attend_flash(fa.flash_attn_func, fa.flash_attn_varlen_func), source
    elif name == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" not in inspect.signature(varlen_attn).parameters:
            raise ImportError("torch.nn.attention.varlen needs torch 2.11")
        yield attend_torch_varlen(varlen_attn), "PyTorch"
    else:
        yield attend_sdpa, "PyTorch"


def pick_dtype(choice: str, device: torch.device) -> torch.dtype:
    """bf16 where matrix products of it are fast: GPUs from Ampere on, and CPUs with AVX512-BF16 or AMX."""
    if choice == "auto":
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = features.get("avx512_bf16") or features.get("amx_bf16")
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        choice = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]


BACKENDS = ("fa3", "fa2", "varlen", "sdpa")  # of attention, the fastest first


class Attention(NamedTuple):
    """The backend that a run uses."""

    name: str
    source: str  # the package, or the repository and its version
    run: Callable  # as attend_sdpa
    skipped: list[str]  # faster ones, and why they were passed over


def try_attention(cfg: Settings, attend: Callable, device: torch.device, dtype: torch.dtype) -> None:
    """Take a backend on a small input, forward and backward; whatever it raises where it does not work."""
    width = cfg.model_dim // cfg.num_heads
    q, k, v = (torch.randn(1, 32, n, width, device=device, dtype=dtype, requires_grad=True)
               for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads))
    bounds = Bounds.find(torch.ones(1, 32, dtype=torch.long, device=device), 0, 16) if cfg.bounded else None
    probe = attend if cfg.compile == "0" else torch.compile(attend, fullgraph=True)
    probe(q, k, v, bounds).sum().backward()
    for rows in (1, 2) if bounds else ():  # documents by themselves, in batches of any size
        probe(*(x.expand(rows, -1, -1, -1).contiguous() for x in (q, k, v)), None).sum().backward()


def pick_attention(cfg: Settings, device: torch.device, dtype: torch.dtype, fastest: str = "fa3") -> Attention:
    """The first backend that works, none before the `fastest` that may be, or the one that ATTENTION asks for.

    All but SDPA need a GPU and bf16. Each is tried on a small input, forward and backward. RunError if the one that
    ATTENTION asks for does not work.
    """
    choice, skipped = cfg.attention, []
    if device.type != "cuda" or dtype != torch.bfloat16:
        if choice not in ("auto", "sdpa"):
            raise RunError(f"ATTENTION={choice}: needs a GPU and bf16; takes sdpa or auto here")
        return Attention("sdpa", "PyTorch", attend_sdpa, [])
    usual = [name for name in BACKENDS[BACKENDS.index(fastest):] if cfg.bounded or name != "varlen"]
    for name in usual if choice == "auto" else (choice,):
        builds = attention_builds(name, device)
        while True:  # until there is no other
            try:
                attend, source = next(builds)
                try_attention(cfg, attend, device, dtype)
                return Attention(name, source, attend, skipped)
            except StopIteration:
                break
            except Exception as e:  # an extension that does not fit the machine can raise anything
                skipped.append(f"{name}: {' '.join(str(e).split())[:120]}")
    raise RunError(f"ATTENTION={choice}: does not work here ({'; '.join(skipped)}); takes auto or sdpa")


def agree_on_attention(cfg: Settings, rt: "Runtime") -> Attention:
    """The same backend on every rank: the fastest that works on all, or each step would wait for the one without."""
    mine = pick_attention(cfg, rt.device, rt.dtype)
    while True:
        place = BACKENDS.index(mine.name)
        slowest = int(rt.largest(place))
        if rt.largest(slowest - place) == 0:
            return mine
        if place < slowest:
            other = pick_attention(cfg, rt.device, rt.dtype, BACKENDS[slowest])
            mine = other._replace(skipped=[*mine.skipped, f"{mine.name}: not on every process", *other.skipped])


# Kernels compute in fp32 what plain forms round at every step.


def kernel(function: Callable) -> Callable:
    """Triton's compiler, or its interpreter under TRITON_INTERPRET=1; the bare function where there is no Triton."""
    return triton.jit(function) if triton else function


@kernel
def load_fp32(place, keep):
    return tl.load(place, keep, other=0.0).to(tl.float32)


@kernel
def store(place, value, keep):
    tl.store(place, value.to(place.dtype.element_ty), keep)


@kernel
def mlp_kernel(a, b, h, out, act, M, N, K, step_k, step_n, BM: constexpr, BN: constexpr, BK: constexpr,
               GRAD: constexpr):
    """The product p (M, N) of a (M, K) and b, whose element (k, n) is at k step_k + n step_n -> out, and with it
    act = squared_leaky_relu(p); or with GRAD p is act's gradient, -> out is that of h, and act is of h.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i, j = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    i, j = tl.swizzle2d(i, j, tiles_m, tiles_n, 8)  # programs at work together share rows and columns
    row, col = (i * BM + tl.arange(0, BM)).to(tl.int64)[:, None], (j * BN + tl.arange(0, BN))[None, :]
    p = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        left = tl.load(a + row * K + k[None, :], (row < M) & (k[None, :] < K), other=0.0)
        right = tl.load(b + k[:, None] * step_k + col * step_n, (k[:, None] < K) & (col < N), other=0.0)
        p = tl.dot(left, right, p, input_precision="ieee")
    at, keep = row * N + col, (row < M) & (col < N)
    value = load_fp32(h + at, keep) if GRAD else p.to(out.dtype.element_ty).to(tl.float32)
    slope = tl.where(value < 0, 0.5, 1.0)
    store(act + at, slope * slope * value * value, keep)
    store(out + at, 2 * slope * slope * value * p if GRAD else p, keep)


@kernel
def capped(logits, col, keep, cap):
    return cap * (2 * tl.sigmoid(2 / cap * load_fp32(logits + col, keep)) - 1)


@kernel
def loss_kernel(logits, targets, g, losses, vocab, cap, BLOCK: constexpr, GRAD: constexpr):
    """cross_entropy() of logits (rows, vocab), one program a row -> losses; or with GRAD, from the gradient g, that of
    the logits in their place.
    """
    row, cap = tl.program_id(0).to(tl.int64), tl.load(cap)
    target, most, total = tl.load(targets + row), -3e38, 0.0
    logits += row * vocab
    for first in tl.range(0, vocab, BLOCK):
        col = first + tl.arange(0, BLOCK)
        t = tl.where(col < vocab, capped(logits, col, col < vocab, cap), -3e38)
        larger = tl.maximum(most, tl.max(t, 0))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(t - larger), 0)
        most = larger
    most += tl.log(total)
    if GRAD:
        scale = load_fp32(g + row, target >= 0)
        for first in tl.range(0, vocab, BLOCK):
            col = first + tl.arange(0, BLOCK)
            t = capped(logits, col, col < vocab, cap)
            slope = scale * (1 - t * t / (cap * cap))
            store(logits + col, slope * (tl.exp(t - most) - tl.where(col == target, 1.0, 0.0)), col < vocab)
    else:
        store(losses + row, tl.where(target >= 0, most - capped(logits, target, target >= 0, cap), 0.0), True)


# Each of these launches a kernel on the inputs of the plain form of its name: forward; or, given the gradients of its
# outputs, backward, and returns those of the first inputs.


def run_mlp(x: Tensor, up: Tensor, down: Tensor, *rest: Tensor) -> list[Tensor]:
    """Forward also returns h (B, T, hidden), before the activation, and backward is given it ahead of the gradient."""
    h, left = rest or (x, x)
    out, act = (x.new_empty(*x.shape[:-1], len(up)) for _ in range(2))
    b, steps = (down, down.stride()) if rest else (up, up.stride()[::-1])
    left = left.flatten(0, -2)
    # backward half as wide, or its registers spill (ptxas, sm_90); large tiles of fp32 do not fit in shared memory
    tile = (128, 128 if rest else 256, 64) if x.dtype == torch.bfloat16 else (32, 32, 32)
    programs = triton.cdiv(len(left), tile[0]) * triton.cdiv(len(up), tile[1])
    mlp_kernel[(programs,)](left, b, h, out, act, len(left), *up.shape, *steps, *tile, bool(rest), num_warps=8)
    if not rest:
        return [F.linear(act, down), out]
    return [out @ up, out.flatten(0, -2).mT @ x.flatten(0, -2), left.mT @ act.flatten(0, -2)]


def run_head_losses(x: Tensor, weight: Tensor, targets: Tensor, cap: Tensor, *grads: Tensor) -> list[Tensor]:
    """Logits never stand whole in memory: the head goes by chunks of tokens, and backward makes each chunk anew."""
    losses, vocab = torch.empty_like(targets, dtype=torch.float32), len(weight)
    gx, gw = (torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)) if grads else (x, None)
    size = max(1, HEAD_CHUNK // vocab)
    parts = [t.flatten(0, 1).split(size) for t in (x, targets, *(grads or [losses]), losses, gx)]
    for rows, target, g, loss, out in zip(*parts):
        logits = rows @ weight.mT
        loss_kernel[(len(rows),)](logits, target, g, loss, vocab, cap, min(8192, triton.next_power_of_2(vocab)),
                                  bool(grads), num_warps=8)
        if grads:
            torch.mm(logits, weight, out=out)
            gw += logits.mT @ rows
    return [gx, gw.to(weight.dtype)] if grads else [losses]


def fused(name: str, run: Callable, count: int, like: Callable, kept: int = 0) -> Callable[..., list[Tensor]]:
    """run(*inputs, *gradients) as one differentiable operator, which torch.compile does not look into.

    Without gradients it gives outputs shaped as `like(*inputs)`, of which the last `kept` are only for backward, behind
    the inputs; with the gradients of the others, those of the first `count` inputs.
    """
    def forward(inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        return run(*(t.contiguous() for t in inputs + grads))

    def shapes(inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in (inputs[:count] if grads else like(*inputs))]

    def remember(*, ctx, inputs: tuple, output: list[Tensor]) -> None:  # so PyTorch calls it
        tensors, _ = inputs
        ctx.rest = [None] * (len(tensors) - count)
        ctx.set_materialize_grads(not kept)  # zeros for an output that nothing reads
        ctx.save_for_backward(*tensors, *output[len(output) - kept :])

    def backward(ctx, grads: list[Tensor | None]) -> tuple:
        return operator(ctx.saved_tensors, grads[: len(grads) - kept]) + ctx.rest, []

    operator = torch.library.custom_op(f"train_gpt::{name}", forward, mutates_args=(), schema="(Tensor[] inputs, "
                                       "Tensor[] grads) -> Tensor[]")
    operator.register_fake(shapes)
    operator.register_autograd(backward, setup_context=remember)
    return lambda *inputs: operator(inputs, [])


@cache  # an operator that is made again takes its first one's place in PyTorch, under those that still call it
def fused_ops() -> Ops:
    """The forms of FUSED=1, all by kernels."""
    mlp = fused("mlp", run_mlp, 3, lambda x, up, _: [x, x.new_empty(*x.shape[:-1], len(up))], kept=1)
    head = fused("head_losses", run_head_losses, 2, lambda x, *_: [x[..., 0].float()])
    return Ops(
        mlp=lambda *inputs: mlp(*inputs)[0],
        head_losses=lambda x, weight, targets, cap: head(x, weight, targets, torch.full((), cap, device=x.device))[0])


def pick_ops(cfg: Settings, device: torch.device) -> Ops:
    """The forms that FUSED asks for. RunError where Triton cannot run them."""
    if cfg.fused and (not triton or (device.type != "cuda" and isinstance(load_fp32, triton.JITFunction))):
        raise RunError("FUSED=1: needs a GPU and Triton; takes 0 here")
    return fused_ops() if cfg.fused else PLAIN


# ----------------------------------------------------------------------------------------------------------------------
# Runtime
#
# In: settings, torchrun's variables. Out: device, log files, clock, and all by which processes talk to each other.


def atomic_write(path: str, content: bytes) -> None:
    """A file that appears under `path` whole or not at all; an error leaves neither it nor a temporary."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(e, OSError):  # a failed write() does not say which file it was
            raise RunError(f"cannot write {path}: {e.strerror or e}") from None
        raise


def save_tensors(rt: "Runtime", name: str, content: dict[str, Any], otherwise: str) -> None:
    """torch.save, atomically. It goes through memory, because torch's writer hides errors of the disk. A full one is no
    reason to lose a run: the log then says `otherwise`.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        atomic_write(rt.path(name), buffer.getbuffer())
    except RunError as e:
        rt.log(f"{otherwise}: {e}")


def say(line: str) -> None:
    """A line to the console; where nobody reads it any more, which is no reason to lose a run, to nowhere."""
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Launch(NamedTuple):
    """This process among the ones torchrun started."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    store: tuple[str, str, str] = ("", "0", "0")  # torchrun's: host, port, and how often it restarted

    @classmethod
    def read(cls, environ: dict[str, str]) -> "Launch":
        """From torchrun's variables; without the first three there is one process."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if not all(environ.get(n, "").isdigit() for n in names):
            return cls()
        places = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        return cls(*(int(environ[n]) for n in names), tuple(environ.get(n, "0") for n in places))


def speaks_first(launch: Launch) -> bool:
    """Whether this process is the first of the run to have an error to tell: all meet the same one, or its echo."""
    if launch.world == 1:
        return True
    host, port, attempt = launch.store
    try:  # torchrun's own store, which outlives its processes
        return dist.TCPStore(host, int(port), timeout=timedelta(seconds=5)).add(f"error {attempt}", 1) == 1
    except (RuntimeError, ValueError):  # then it is rank 0's to tell, unless that is what is missing
        time.sleep(5 if launch.rank else 0)
        return True


def tell(launch: Launch, message: str) -> None:
    """The one line on stderr, from one process of the run."""
    if speaks_first(launch):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)


def leave(status: int) -> None:
    """End this process of several at once: an orderly exit waits for the others, and Gloo's threads can abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_when_told(launch: Launch) -> None:
    """End on SIGTERM, which torchrun sends when one process is gone, even if the main thread waits for that one."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer)

    def wait() -> None:
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        tell(launch, "another process of this run has ended")
        leave(143)

    threading.Thread(target=wait, daemon=True).start()


def keep_freed_memory() -> None:
    """Have glibc, where there is one, keep memory of tensors that are gone for the next ones (for runs on a CPU).

    It would hand every block over 32 MB back to the system as soon as it is free, and the next one costs a page fault
    for each 4 kB: a quarter of a step's time, where losses are over 8,192 tokens (docs/log.md). Above 256 MB it still
    does: the memory that glibc keeps can be several times the largest block.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 256 << 20)
        mallopt(m_trim_threshold, 2**31 - 1)


NCCL_DTYPES = {torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16,
               torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}


class Runtime:
    """Device, processes and log of one run. Rank 0 speaks and writes; the others compute."""

    def __init__(self, cfg: Settings, launch: Launch):
        self.rank, local_rank, self.world, _ = launch
        cuda = torch.cuda.is_available()
        if cfg.device == "cuda" and not cuda:
            raise RunError("DEVICE=cuda: no GPU that PyTorch can use; takes cpu or auto")
        if cuda and cfg.device != "cpu" and local_rank >= torch.cuda.device_count():
            raise RunError("torchrun started more processes than there are GPUs; lower --nproc_per_node or take "
                           "DEVICE=cpu")
        self.device = torch.device("cuda", local_rank) if cuda and cfg.device != "cpu" else torch.device("cpu")
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.log_file, self.metrics_file, self.events = None, None, []
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.reset_peak_memory_stats()
        else:
            keep_freed_memory()
        if self.world > 1:  # CPU tensors always go by Gloo: the clock agrees without waiting for the GPU
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            with self.exchange("start"):
                dist.init_process_group(backend, timeout=timedelta(minutes=30))
        # rank 0's: each process chose a name of its own
        self.folder = os.fsdecode(self.share_bytes(os.fsencode(cfg.artifact_dir)))

    def open_logs(self, append: bool, training: bool = True) -> None:
        """Start writing into the run's folder; only once its inputs are known to be good.

        The folder is this process's as long as it runs: a lock on train.log keeps a second run out. RunError where
        another one holds it, or where a run without `training` would replace the result of one with it.
        """
        if self.rank:
            return
        os.makedirs(self.folder, exist_ok=True)
        self.log_file = open(self.path("train.log"), "a", encoding="utf-8", errors="backslashreplace")
        try:
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"ARTIFACT_DIR={self.folder}: another run is writing there; takes a folder of its "
                           "own") from None
        except OSError:  # a file system without locks
            pass
        if os.path.exists(self.path("result.json")):
            if not training and self.holds_training():
                raise RunError(f"ARTIFACT_DIR={self.folder}: holds the result of a training run, which EVAL_ONLY would "
                               "replace; takes another folder")
            os.remove(self.path("result.json"))  # a result is of the run that finished, never of the one before
        if not append:
            self.log_file.truncate(0)
            if os.path.exists(self.path("checkpoint.pt")):  # an earlier run's, which RESUME=1 must not go on from
                os.replace(self.path("checkpoint.pt"), self.path("checkpoint.old.pt"))
            with suppress(FileNotFoundError):  # nor is this one's model the earlier run's
                os.remove(self.path("final_model.pt"))
        self.metrics_file = open(self.path("metrics.jsonl"), "a" if append else "w", encoding="utf-8")

    def holds_training(self) -> bool:
        """Whether the folder's result.json is of a run that trained, or cannot be read."""
        try:
            with open(self.path("result.json"), encoding="utf-8") as file:
                return json.load(file)["steps"] != 0
        except (ValueError, LookupError, TypeError):
            return True

    def forget_after(self, step: int) -> None:
        """Take from metrics.jsonl what was logged after `step`, from where a resumed run logs again."""
        def logged_at(line: str) -> float:  # stages in training are called step<n>
            try:
                entry = json.loads(line)
            except ValueError:  # a full disk may leave half a line
                return math.inf
            stage = entry.get("stage", "")
            return entry.get("step", int(stage[4:]) if stage.startswith("step") else math.inf)

        if self.rank == 0:
            self.metrics_file.close()
            with open(self.path("metrics.jsonl"), encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]  # a killed run may leave half a line
            kept = "".join(line for line in lines if logged_at(line) <= step)
            atomic_write(self.path("metrics.jsonl"), kept.encode())
            self.metrics_file = open(self.path("metrics.jsonl"), "a", encoding="utf-8")

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
        for file in (self.log_file, self.metrics_file):
            if file:
                file.close()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def log(self, message: str) -> None:
        """One line to the console and train.log, from rank 0."""
        if self.rank == 0:
            self.note(message)
            say(message)

    def note(self, message: str) -> None:
        """One line to train.log alone: what a reader of the console can do without."""
        self.write_line(self.log_file, message)

    def metric(self, **values) -> None:
        """One line to metrics.jsonl."""
        self.write_line(self.metrics_file, json.dumps(values))

    def write_line(self, file: Any, line: str) -> None:
        if self.rank == 0:
            try:
                print(line, file=file, flush=True)
            except OSError as e:  # a full disk ends the run where a result cannot be written, not a line
                print(f"note: {file.name} misses a line: {e.strerror}", file=sys.stderr)

    def progress(self, items: Iterable, what: str, running: Callable[[], str] | None = None) -> Iterator[Any]:
        """The items, with a bar on rank 0's terminal that shows what `running` says; no bar where output is a file."""
        with tqdm(items, desc=what, leave=False, disable=None if self.rank == 0 else True) as bar:
            shown = time.perf_counter()
            for item in bar:
                yield item
                if running and not bar.disable and time.perf_counter() - shown > 1:
                    shown = time.perf_counter()
                    bar.set_postfix_str(running())

    # Ranks talk to each other here and nowhere else. What NCCL refuses is refused on every device and for any number of
    # processes, so that one process on a CPU sees what eight GPUs would.

    @contextmanager
    def exchange(self, what: str, *tensors: Tensor) -> Iterator[None]:
        """Checks tensors on this rank's device before they are exchanged, and turns what goes wrong into one line."""
        for t in tensors:
            fault = (f"{t.dtype}" if t.dtype not in NCCL_DTYPES else f"strides {t.stride()}" if not t.is_contiguous()
                     else f"on {t.device}, not {self.device}" if t.device != self.device else "")
            if fault:
                raise RunError(f"{what} over ranks: cannot exchange a tensor {tuple(t.shape)}, {fault}; a defect of "
                               "this script")
        try:
            if tensors and self.world > 1 and self.device.type == "cpu":  # on GPUs ranks that disagree wait for ever
                mine = [(t.dtype, t.shape) for t in tensors]
                theirs = [None] * self.world
                dist.all_gather_object(theirs, (what, mine))
                if theirs != [(what, mine)] * self.world:
                    raise RunError(f"{what} over ranks: not the same on each: {theirs}; a defect of this script")
            yield
        except (RuntimeError, ValueError) as e:
            gone = isinstance(e, dist.DistError) or "gloo" in str(e)
            raise RunError("another process of this run has ended" if gone else f"{what} over ranks: {e}") from None

    def sum_(self, tensor: Tensor, what: str = "sum") -> Tensor:
        """Sum over ranks, in place."""
        with self.exchange(what, tensor):
            if self.world > 1:
                dist.all_reduce(tensor)
        return tensor

    def share_(self, tensor: Tensor, what: str = "broadcast") -> Tensor:
        """Rank 0's values on every rank, in place."""
        with self.exchange(what, tensor):
            if self.world > 1:
                dist.broadcast(tensor, 0)
        return tensor

    def sum_shares(self, whole: Tensor, what: str = "sum of shares") -> Callable[[], Tensor]:
        """Begins; what it returns waits for this rank's share (n, ...) of the sum of `whole` (world * n, ...)."""
        return self.exchange_shares(what, whole, whole.size(0) // self.world, dist.reduce_scatter_tensor)

    def gather_shares(self, share: Tensor, what: str = "gathering") -> Callable[[], Tensor]:
        """Begins; what it returns waits for the shares (n, ...) of all ranks, (world * n, ...)."""
        return self.exchange_shares(what, share, share.size(0) * self.world, dist.all_gather_into_tensor)

    def exchange_shares(self, what: str, tensor: Tensor, count: int, run: Callable) -> Callable[[], Tensor]:
        """Start `run` from `tensor` into a new one of `count` slices; what is returned waits for it and returns it."""
        with self.exchange(what, tensor):
            if self.world == 1:
                return lambda: tensor
            out = tensor.new_empty(count, *tensor.shape[1:])
            work = run(out, tensor, async_op=True)

        def wait() -> Tensor:
            with self.exchange(what):
                work.wait()
            return out

        return wait

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, the same float on every rank. Does not wait for the GPU."""
        tensor = torch.tensor([value], dtype=torch.float64)
        with self.exchange("the largest"):
            if self.world > 1:
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def share_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank."""
        if self.world == 1:
            return data
        size = int(self.largest(len(data) if self.rank == 0 else 0))
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 else torch.empty(
            size, dtype=torch.uint8)
        with self.exchange("bytes"):
            dist.broadcast(tensor, 0)
        return tensor.numpy().tobytes()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def host_waits(self) -> Iterator[Counter]:
        """Counts, by line, how often the host waits for the GPU meanwhile, as PyTorch warns of; none on a CPU."""
        found: Counter = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                if self.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        found.update(f"{os.path.basename(w.filename)}:{w.lineno}" for w in caught
                     if "called a synchronizing" in str(w.message))

    def throttle(self) -> None:
        """Let the host run at most two steps ahead of the GPU, so that the clock means what it says."""
        if self.device.type == "cuda":
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.pop(0).synchronize()

    def peak_memory(self) -> int:
        """Bytes: allocated on the GPU, or resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Training seconds against a limit; validation in between does not count. All ranks see the slowest rank's time.

    `limit` 0 means no clock. Training must end by `limit - reserve`; the reserve is for calibration.
    """

    def __init__(self, rt: Runtime, limit: float, reserve: float, lap: float = 0.0):
        """`lap`: seconds of a step as far as known before the first."""
        self.rt, self.limit, self.reserve, self.lap = rt, limit, min(reserve, limit), lap
        self.spent, self.started, self.laps = 0.0, None, []

    def start(self) -> None:
        self.rt.sync()
        self.started = time.perf_counter()

    def stop(self) -> float:
        self.rt.sync()
        self.spent, self.started = self.seconds(), None
        return self.spent

    def seconds(self) -> float:
        return self.spent + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def tick(self) -> float:
        """Seconds agreed by all ranks; call once before each step."""
        now = self.rt.largest(self.seconds())
        self.laps = self.laps[-5:] + [now]
        return now

    def allows_step(self) -> bool:
        """Whether one more step ends in time, judged by the slowest of the last five (the GPU may lag by two)."""
        if not self.limit:
            return True
        lap = max((b - a for a, b in itertools.pairwise(self.laps)), default=self.lap)  # 0 at first: not known
        steps = 3 if self.rt.device.type == "cuda" else 1
        return self.laps[-1] + steps * lap <= self.limit - self.reserve


# ----------------------------------------------------------------------------------------------------------------------
# Data
#
# In: shards of uint16 tokens, their manifest, a SentencePiece model. Out: the validation text with the bytes that each
# token stands for, and the batches of each training step on each process.


SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
CASE_MARKERS = "\ue001\ue002\ue003\ue004"  # of CaseOps: a capital and small letters, all capitals, one, no marker
PAIRS_MARK, PAIRS_START = 20261126, 5  # in a header: how many pairs of tokens are fused follows, then those


def read_shard(path: str, vocab_size: int | None = None) -> np.ndarray:
    """Tokens of a shard, (count,) uint16, memory-mapped. RunError when header or size is wrong, or a token given V."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256:
        raise RunError(f"{path}: not a token shard: expected a header of {SHARD_HEADER_BYTES} bytes, found {size}")
    magic, version, count = (int(v) for v in header[:3])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise RunError(f"{path}: expected magic {SHARD_MAGIC} version {SHARD_VERSION}, found {magic} and {version}")
    if count < 0 or size != SHARD_HEADER_BYTES + 2 * count:
        raise RunError(f"{path}: expected {SHARD_HEADER_BYTES + 2 * count} bytes for {count} tokens, found {size}")
    if count == 0:
        return np.zeros(0, dtype="<u2")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        check_tokens(tokens, vocab_size, path)
    return tokens


def check_tokens(tokens: np.ndarray, vocab_size: int, path: str) -> None:
    if int(tokens.max()) >= vocab_size:
        raise RunError(f"{path}: expected token ids below VOCAB_SIZE={vocab_size}, found {int(tokens.max())}")


def find_shards(folder: str, split: str) -> list[str]:
    """Paths of the `train`, `val` or `val_bytes` shards in a folder, in order.

    RunError where a file beside them looks like a shard and has another name (a copy would be text counted twice), or
    where their numbers do not run from 0 without a gap.
    """
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    looks_like_one = re.compile(rf"(?!\.).*fineweb_{split}(?!_bytes).*\.bin", re.IGNORECASE)
    shards = [name for name in names if re.fullmatch(rf"fineweb_{split}_\d{{6}}\.bin", name, re.ASCII)]
    strangers = [name for name in names if looks_like_one.fullmatch(name) and name not in shards]
    if strangers:
        raise RunError(f"{os.path.join(folder, strangers[0])}: looks like a shard and is not named like one; takes "
                       f"fineweb_{split}_000000.bin, _000001.bin and so on, and no other {split} files beside them")
    for number, name in enumerate(shards):
        if name != (expected := f"fineweb_{split}_{number:06}.bin"):
            raise RunError(f"{os.path.join(folder, expected)}: missing; the shards are numbered from 0 without a gap, "
                           f"and {name} is there")
    return [os.path.join(folder, name) for name in shards]


def shard_paths(cfg: Settings, split: str) -> list[str]:
    """Paths of the `train` or `val` shards; RunError when there are none, or more than the manifest lists."""
    paths = find_shards(cfg.data_path, split)
    if not paths:
        raise RunError(f"DATA_PATH={cfg.data_path}: no fineweb_{split}_*.bin there; "
                       "data/cached_challenge_fineweb.py downloads them, data/tokenize_docs.py makes them, "
                       "./run_smoke_1gpu.sh makes a small set")
    listed = manifest_stats(cfg.data_path).get(f"files_{split}", len(paths))
    if len(paths) > listed:
        raise RunError(f"{paths[listed]}: not in the manifest, which lists {listed} {split} shards")
    return paths


@dataclasses.dataclass(frozen=True)
class ByteTable:
    """How many bytes of text a token stands for, given the token before it."""

    length: Tensor  # (V,) int32: UTF-8 bytes of the piece without its leading space
    space: Tensor  # (V,) int32: 1 where the piece starts with a space
    boundary: Tensor  # (V,) bool: control, unknown and unused pieces, which cost no bytes
    space_after_boundary: int  # bytes of a space that opens a document: 0 where decoding strips it
    bos: int  # id of the token that starts a document, -1 if the tokenizer has none
    case_markers: bool = False  # the pieces include those of CaseOps
    spare: frozenset[int] = frozenset()  # pieces of bytes that stand in no UTF-8 text, so encoding never gives them

    def of(self, tokens: Tensor) -> Tensor:
        """(N,) int32 bytes charged to each token of a stream (N,); the first, which is no target, costs 0."""
        tokens = tokens.long()
        after_boundary = self.boundary[tokens[:-1]].int()
        space = self.space[tokens[1:]] * (1 - after_boundary * (1 - self.space_after_boundary))
        return F.pad(self.length[tokens[1:]] + space, (1, 0))


def read_tokenizer(path: str, vocab_size: int, bos: int | None = None) -> ByteTable:
    """Byte table of a SentencePiece model. `bos`: the token that starts documents; None: the tokenizer's own.

    RunError where the model does not fit VOCAB_SIZE, or bytes could not be counted exactly: without a stand-alone "▁"
    piece SentencePiece spells a lone space as three byte tokens; a mark of documents that is a piece of text would take
    text out of the count; and some models spell or decode other text than was encoded.
    """
    import sentencepiece

    if not os.path.exists(path):
        raise RunError(f"TOKENIZER_PATH={path}: no such file; data/cached_challenge_fineweb.py downloads one, "
                       "data/tokenize_docs.py makes one, each beside its shards")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        raise RunError(f"TOKENIZER_PATH={path}: not a SentencePiece model") from None
    if sp.vocab_size() != vocab_size:
        raise RunError(f"TOKENIZER_PATH={path}: has {sp.vocab_size()} pieces, expected VOCAB_SIZE={vocab_size}")
    pieces = {sp.id_to_piece(i) for i in range(vocab_size)}
    if "▁" not in pieces:
        raise RunError(f"TOKENIZER_PATH={path}: has no stand-alone '▁' piece, so bytes would be miscounted")
    length, space, boundary = (np.zeros(vocab_size, dtype=np.int32) for _ in range(3))
    for i in range(vocab_size):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            boundary[i] = 1
        elif sp.is_byte(i):
            length[i] = 1
        else:
            space[i] = piece.startswith("▁")
            length[i] = len(piece[space[i]:].replace("▁", " ").encode())
    if bos is not None:
        if bos >= vocab_size or not (boundary[bos] or is_user_defined(sp, bos)):
            raise RunError(f"BOS_ID={bos}: takes a control or user-defined piece of {path}; a document's mark costs no "
                           "bytes, so it must not be a piece of text")
        boundary[bos], length[bos], space[bos] = 1, 0, 0
    keeps_space = sp.decode_pieces(["▁", "a"]).startswith(" ")
    tensors = torch.from_numpy(length), torch.from_numpy(space), torch.from_numpy(boundary).bool()
    spare = frozenset(sp.piece_to_id(f"<0x{byte:02X}>") for byte in (0xC0, 0xC1, *range(0xF5, 0x100)))
    table = ByteTable(*tensors, int(keeps_space), sp.bos_id() if bos is None else bos, pieces.issuperset(CASE_MARKERS),
                      spare - {sp.unk_id()})
    probe, mark = "Bytes of a probe", max(table.bos, 0)
    ids = sp.encode(probe)
    counted, decoded = int(table.of(torch.tensor([mark, *ids])).sum()), len(sp.decode(ids).encode())
    known = table.boundary[mark] and sp.unk_id() not in ids
    if known and not counted == decoded == len(probe):
        raise RunError(f"TOKENIZER_PATH={path}: spells {probe!r} in pieces of {counted} bytes that decode to "
                       f"{decoded}, not {len(probe)}, so bytes would be miscounted")
    return table


def is_user_defined(sp: Any, token: int) -> bool:
    """Whether a piece is user-defined. The library does not tell; the model has it as piece, score and kind (4)."""
    entry = sp.id_to_piece(token).encode() + b"\x15" + struct.pack("<f", sp.get_score(token)) + b"\x18\x04"
    return entry in sp.serialized_model_proto()


def charged_bytes(cfg: Settings, table: ByteTable, paths: list[str], tokens: Tensor) -> Tensor:
    """(N,) int32 bytes charged to each token of the validation shards `paths`: by the table; for CaseOps, whose text is
    not the raw one, by the shards' sidecars. RunError where shards, tokenizer and CASEOPS_ENABLED do not go together.
    """
    sidecars = find_shards(cfg.data_path, "val_bytes")
    for there, where, what in ((bool(sidecars), f"DATA_PATH={cfg.data_path}", "fineweb_val_bytes_*.bin"),
                               (table.case_markers, f"TOKENIZER_PATH={cfg.tokenizer_path}", "pieces for CaseOps")):
        if there != cfg.caseops_enabled:
            raise RunError(f"CASEOPS_ENABLED={int(cfg.caseops_enabled)}: {where} has {'' if there else 'no '}{what}")
    if not sidecars:
        return table.of(tokens)
    counts = [read_shard(path) for path in sidecars]
    expected = {"fineweb_val_bytes_".join(p.rsplit("fineweb_val_", 1)): os.path.getsize(p) for p in paths}
    found = {p: SHARD_HEADER_BYTES + 2 * len(c) for p, c in zip(sidecars, counts)}
    if expected != found:
        wrong = min(set(expected.items()) ^ set(found.items()))[0]
        raise RunError(f"{wrong}: expected one number for each token of its shard")
    charged = torch.from_numpy(np.concatenate(counts).astype(np.int32))
    if charged[table.boundary[tokens.long()]].any():
        raise RunError(f"DATA_PATH={cfg.data_path}: its sidecars charge bytes to tokens that start a document")
    charged[0] = 0  # no target
    return charged


def fused_pairs(cfg: Settings, table: ByteTable, paths: list[str]) -> list[list[int]]:
    """[id, piece, marker] of each id that stands for two tokens (data/caseops.py), as the headers of `paths` list them.
    RunError where one differs from the first, or has pairs that are none of this tokenizer.
    """
    found = []
    for path in paths:
        header = [*np.fromfile(path, dtype="<i4", count=256).tolist(), *[0] * 256]  # a file may be cut off
        count = header[PAIRS_START - 1] if header[3] == PAIRS_MARK else 0
        pairs = [header[i : i + 3] for i in range(PAIRS_START, min(PAIRS_START + 3 * count, 256), 3)]
        ids, parts = {pair[0] for pair in pairs}, {part for pair in pairs for part in pair[1:]}
        known = ids <= table.spare and parts <= {*range(cfg.vocab_size)} - ids and len(ids) == count
        if count and not (cfg.caseops_enabled and known):
            raise RunError(f"{path}: lists pairs of tokens that are none of TOKENIZER_PATH={cfg.tokenizer_path}")
        found.append(pairs)
        if pairs != found[0]:
            raise RunError(f"{path}: lists other pairs of tokens than {paths[0]}; the shards are of two data sets")
    return found[0]


def ngram_of(cfg: Settings) -> tuple[list[int], float] | None:
    """TOKEN_ORDER and TOKEN_THRESHOLD, where hints are wanted."""
    return (cfg.token_orders(), cfg.token_threshold) if cfg.ngram_tilt_enabled else None


@dataclasses.dataclass(frozen=True)
class Validation:
    """The text that is scored, whole."""

    tokens: Tensor  # (N,) int32, on the device
    bytes: Tensor  # (N,) int32: bytes charged to each
    docs: int
    complete: bool | None  # as the manifest says; None without a manifest
    bos: int = -1  # the token that starts a document
    ngram: tuple[list[int], float] | None = None  # as ngram_of() has it
    pairs: Sequence[list[int]] = ()  # of tokens that are fused, in all shards: id, piece, marker

    @classmethod
    def load(cls, cfg: Settings, table: ByteTable, device: str | torch.device = "cpu") -> "Validation":
        paths = shard_paths(cfg, "val")
        tokens = torch.from_numpy(np.concatenate([read_shard(p, cfg.vocab_size) for p in paths]).astype(np.int32))
        if len(tokens) < 2:
            raise RunError(f"DATA_PATH={cfg.data_path}: the validation shards hold {len(tokens)} tokens, nothing to "
                           "score")
        bos = table.bos if cfg.bos_id is None else cfg.bos_id
        docs = int((tokens == bos).sum())
        if not docs and (cfg.varlen_enabled or cfg.bos_id is not None or cfg.ttt_mode in ("lora", "phased")):
            raise RunError(f"DATA_PATH={cfg.data_path}: token {bos} (BOS) does not occur; BOS_ID takes the one "
                           "that starts documents")
        found = {"files_val": len(paths), "tokens_val": len(tokens), "docs_val": docs}
        charged = charged_bytes(cfg, table, paths, tokens)
        if cfg.caseops_enabled:
            found["bytes_val"] = int(charged.sum())
        pairs = fused_pairs(cfg, table, paths + ([] if cfg.eval_only else find_shards(cfg.data_path, "train")))
        return cls(tokens.to(device), charged, docs, matches_manifest(cfg.data_path, found), bos, ngram_of(cfg), pairs)

    @cached_property
    def hints(self) -> Tensor | None:
        """A hint (N,) int64 for each of these tokens, made when first asked for; None where no hints are wanted."""
        return self.ngram and find_hints(self.tokens, *self.ngram)

    def over(self, tokens: Tensor, charged: Tensor | None = None) -> "Validation":
        """Another stream (N,) in place of this one, with the bytes `charged` to each token; None: one each."""
        charged = torch.ones(len(tokens), dtype=torch.int32) if charged is None else charged
        return Validation(tokens, charged, int((tokens == self.bos).sum()), None, self.bos, self.ngram, self.pairs)


def manifest_stats(data_path: str) -> dict[str, int]:
    """Counts of this data set in manifest.json, beside datasets/ or in the folder; empty where no manifest lists it.

    Other programs write files of that name too, so what is not a list of data sets is passed over.
    """
    folder = os.path.abspath(data_path)
    above = os.path.dirname(os.path.dirname(folder)), os.path.join(folder, "..", "..")  # not the same through links
    for path in (os.path.join(place, "manifest.json") for place in (*above, folder)):
        try:
            with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a byte-order mark
                datasets = json.load(file)["datasets"]
            stats = next(d["stats"] for d in datasets if d["name"] == os.path.basename(folder))
            counts = {name: count for name, count in stats.items() if type(count) is int}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
            continue
        if counts:
            return counts
    return {}


def matches_manifest(data_path: str, found: dict[str, int]) -> bool | None:
    """Whether the counts equal the manifest's; None where it has none of them."""
    stats = manifest_stats(data_path)
    shared = [name for name in found if name in stats]
    return all(found[name] == stats[name] for name in shared) if shared else None


class Batch(NamedTuple):
    """Rows of tokens on the device, and where attention begins and ends in them if that is not their length."""

    ids: Tensor  # (rows, length) int64
    targets: Tensor  # (rows, length) int64: the tokens after them; IGNORE in rows of padding
    bounds: "Bounds | None" = None

    @classmethod
    def of(cls, cfg: Settings, ids: Tensor, targets: Tensor, bos: int, window: int) -> "Batch":
        """Rows in which attention spans up to `window` tokens, with VARLEN inside documents."""
        if window == cfg.train_seq_len and not cfg.varlen_enabled:
            return cls(ids, targets)
        return cls(ids, targets, Bounds.find(ids, bos if cfg.varlen_enabled else -1, window))

    def to(self, device: torch.device) -> "Batch":
        """The same on a device, where a GPU copies it while it computes."""
        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        bounds = self.bounds and Bounds(*map(move, self.bounds[:2]), self.bounds.max_len)
        return Batch(move(self.ids), move(self.targets), bounds)


def filler(bos: int) -> int:
    """The token of padding: one that starts no document."""
    return 0 if bos else 1


class Windows:
    """Rows of the training shards in one global order that no number of ranks changes.

    Row g of the run is row g mod n of epoch g // n, an epoch being a permutation of all rows drawn from (SEED, epoch).
    A row is a window of TRAIN_SEQ_LEN, or with VARLEN one or several windows of documents in a row. It holds one
    token more than its length, the next one starts at that token. The position in the run is the one number g.
    """

    def __init__(self, cfg: Settings, rt: Runtime, bos: int = -1):
        self.cfg, self.rt, self.bos, self.length = cfg, rt, bos, cfg.row_tokens
        paths = shard_paths(cfg, "train")
        self.paths, self.shards = paths, [read_shard(p) for p in paths]
        per_shard = [max(0, (len(s) - 1) // self.length) for s in self.shards]
        self.first = np.concatenate(([0], np.cumsum(per_shard)))  # index of each shard's first row
        self.count = int(self.first[-1])
        if self.count == 0:
            raise RunError(f"DATA_PATH={cfg.data_path}: no train shard holds one row of {self.length} tokens and the "
                           "next token; lower TRAIN_SEQ_LEN")
        if cfg.varlen_enabled and not (self.shards[0][: 2**20] == bos).any():
            raise RunError(f"{paths[0]}: token {bos} (BOS) does not occur in its first {2**20} tokens; BOS_ID takes "
                           "the one that starts documents, VARLEN_ENABLED=0 needs none")
        self.epoch, self.order = -1, None

    def identity(self) -> dict[str, str]:
        """By shard, its name, what it holds: a count of tokens, and a hash of its first and last ones.

        A checkpoint keeps this. The order of rows follows from the shards, so over others it would be another run.
        """
        ends = [np.concatenate((shard[:4096], shard[-4096:])).tobytes() for shard in self.shards]
        return {os.path.basename(path): f"{len(shard)} tokens, hash {hashlib.sha256(end).hexdigest()[:16]}"
                for path, shard, end in zip(self.paths, self.shards, ends)}

    def window(self, g: int) -> np.ndarray:
        """(length + 1,) uint16 tokens of the run's g-th row."""
        epoch, index = divmod(g, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.cfg.seed, epoch]).permutation(self.count)
        w = int(self.order[index])
        shard = int(np.searchsorted(self.first, w, side="right")) - 1
        start = (w - int(self.first[shard])) * self.length
        tokens = self.shards[shard][start : start + self.length + 1]
        check_tokens(tokens, self.cfg.vocab_size, self.paths[shard])  # here, not at start: reading costs clock time
        return tokens

    def batch(self, first: int, real: int, size: int, window: int = 0) -> Batch:
        """`size` rows: `real` ones from `first` on, then padding, which costs time but adds nothing to the loss.

        Attention spans up to `window` tokens, 0: TRAIN_SEQ_LEN. The rows do not depend on it.
        """
        tokens = np.full((size, self.length + 1), filler(self.bos), dtype=np.int64)
        for row in range(real):
            tokens[row] = self.window(first + row)
        # numpy's copy: torch takes one row of a wider array as contiguous, and its odd stride means compiling again
        ids, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
        targets[real:] = IGNORE
        return Batch.of(self.cfg, ids, targets, self.bos, window or self.cfg.train_seq_len).to(self.rt.device)


class StepPlan(NamedTuple):
    """How one global batch is dealt: each rank takes `per_rank` rows in `micro` forward passes of `size`."""

    windows: int
    per_rank: int
    micro: int
    size: int

    @classmethod
    def of(cls, cfg: Settings, world: int) -> "StepPlan":
        windows = cfg.train_batch_tokens // cfg.row_tokens
        per_rank = -(-windows // world)
        micro = -(-per_rank // (cfg.micro_batch_tokens // cfg.row_tokens))
        return cls(windows, per_rank, micro, -(-per_rank // micro))

    def parts(self, rank: int) -> list[tuple[int, int]]:
        """(first row within the step, how many are real) of each of the rank's forward passes."""
        end = min((rank + 1) * self.per_rank, self.windows)
        firsts = [rank * self.per_rank + m * self.size for m in range(self.micro)]
        return [(first, max(0, min(self.size, end - first))) for first in firsts]


class Feeder:
    """The batches of successive steps for this rank, the next step's prepared while this one runs."""

    def __init__(self, windows: Windows, plan: StepPlan, position: int = 0):
        self.windows, self.plan, self.position, self.ready, self.window = windows, plan, position, None, 0
        device = windows.rt.device  # a thread starts on GPU 0, whatever the process uses
        self.pool = ThreadPoolExecutor(1, initializer=torch.cuda.set_device if device.type == "cuda" else None,
                                       initargs=(device,) if device.type == "cuda" else ())

    def _load(self, position: int, window: int) -> list[Batch]:
        parts = self.plan.parts(self.windows.rt.rank)
        return [self.windows.batch(position + first, real, self.plan.size, window) for first, real in parts]

    def next(self, window: int = 0) -> list[Batch]:
        """This step's batches. What was prepared for another window is read again: once, where windows grow."""
        prepared = self.ready.result() if self.ready else None
        batches = prepared if prepared and window == self.window else self._load(self.position, window)
        self.position, self.window = self.position + self.plan.windows, window
        self.ready = self.pool.submit(self._load, self.position, window)
        return batches

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers
#
# In: a model's gradients on this process. Out: its weights after a step, the same on every process: Muon for the banks,
# of which each process updates its share, AdamW for the rest.


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype, kind: str = "quintic") -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of `matrices` (n, rows, cols); singular values go to ~1.

    Iterates X <- aX + (bA + cA²)X with A = XXᵀ on the short side, in three batched products. quintic: one triple for
    all steps (Muon, K. Jordan 2024); polar: one a step, the last of them from then on (Polar Express, arXiv
    2505.16932; to seven digits).
    """
    triples = {"quintic": [(3.4445, -4.7750, 2.0315)], "polar": [
        (8.156555, -22.48329, 15.87877), (4.042930, -2.808917, 0.5000178), (3.891668, -2.772484, 0.5060648),
        (3.285754, -2.368129, 0.4644902), (2.346541, -1.709783, 0.4232355)]}[kind]
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for step in range(steps):
        a, b, c = triples[min(step, len(triples) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).contiguous()  # as ranks exchange them


def slices_by_heads(cfg: Settings, bank: str) -> int:
    """How many of a bank's slices, its first ones, Muon cuts into heads: those of queries and keys."""
    return cfg.num_layers if cfg.muon_qk_heads and bank in ("qo_bank", "kv_bank") else 0


class Muon:
    """Momentum, orthogonalised, on banks (n, rows, cols); each rank keeps and works on its share of the slices.

    A bank's gradient is summed by reduce-scatter over its slices (padded to a multiple of the ranks), all banks' at
    once; its update comes back by all-gather while the next bank is worked on.
    """

    def __init__(self, banks: dict[str, nn.Parameter], cfg: Settings, rt: Runtime):
        self.params, self.cfg, self.rt = list(banks.values()), cfg, rt
        self.share = [-(-p.size(0) // rt.world) for p in self.params]  # slices of a rank
        self.momentum = [torch.zeros(n, *p.shape[1:], device=p.device) for n, p in zip(self.share, self.params)]
        self.by_heads = [min(max(slices_by_heads(cfg, name) - rt.rank * n, 0), n) for name, n in zip(banks, self.share)]

    def start_reduce(self) -> None:
        """Begin summing the gradients over ranks."""
        self.reducing = []
        for p, share in zip(self.params, self.share):
            missing = share * self.rt.world - p.size(0)
            grad = F.pad(p.grad, (0, 0, 0, 0, 0, missing)) if missing else p.grad
            self.reducing.append(self.rt.sum_shares(grad, "gradients of a bank"))

    def finish_reduce(self) -> list[Tensor]:
        """This rank's shares of the summed gradients; a slice stands on exactly one rank."""
        self.shards, self.reducing = [wait() for wait in self.reducing], []
        return self.shards

    def step(self, lr_scale: float, momentum: float) -> None:
        """W <- (1 - lr wd) W - lr sqrt(max(1, rows/cols)) NS(g + momentum m)."""
        gathered = []
        for m, grad, by_heads in zip(self.momentum, self.shards, self.by_heads):
            m.mul_(momentum).add_(grad)
            update = grad.add(m, alpha=momentum)
            if self.cfg.muon_row_normalize:  # MuonEq-R, arXiv 2603.28254
                update = F.normalize(update, dim=-1)
            gathered.append(self.rt.gather_shares(self.orthogonalize(update, by_heads), "updates of a bank"))
        lr = self.cfg.matrix_lr * lr_scale
        for p, wait in zip(self.params, gathered):
            shape_scale = max(1.0, p.size(1) / p.size(2)) ** 0.5
            p.detach().mul_(1 - lr * self.cfg.muon_wd).add_(wait()[: p.size(0)], alpha=-lr * shape_scale)
        self.shards = []  # on one rank these are the gradients themselves

    def orthogonalize(self, update: Tensor, by_heads: int) -> Tensor:
        """NS of each slice of an update. The first `by_heads` slices are cut into heads, which may then step along the
        same directions of the input; in one matrix theirs would be orthogonal (modded-nanogpt takes pairs of heads).
        """
        cfg, dtype = self.cfg, torch.bfloat16 if update.is_cuda else torch.float32
        heads = update[:by_heads].reshape(-1, cfg.model_dim // cfg.num_heads, update.size(2))
        done = [newton_schulz(part, cfg.muon_backend_steps, dtype, cfg.muon_ns)
                for part in (heads, update[by_heads:]) if len(part)]
        return torch.cat([part.view(-1, *update.shape[1:]) for part in done]) if by_heads else done[0]

    def state(self) -> list[Tensor]:
        """Momentum of whole banks, gathered from all ranks, so that any number of ranks can go on with it."""
        return [self.rt.gather_shares(m, "momentum of a bank")()[: len(p)].cpu()
                for p, m in zip(self.params, self.momentum)]

    def load(self, state: list[Tensor]) -> None:
        for whole, m, share in zip(state, self.momentum, self.share, strict=True):
            mine = whole[self.rt.rank * share : (self.rt.rank + 1) * share]
            m.zero_()[: len(mine)] = mine.to(m.device)


class Optimizer:
    """Muon on the banks, AdamW on the embedding and the vectors, one gradient norm over all."""

    def __init__(self, model: GPT, cfg: Settings, rt: Runtime):
        self.cfg, self.rt = cfg, rt
        self.muon = Muon(model.params_of("matrix"), cfg, rt)
        groups = [{"params": params, "lr": lr, "weight_decay": decay} for trained, lr, decay in (
            ("embedding", cfg.tied_embed_lr, cfg.embed_wd), ("head", cfg.head_lr, cfg.embed_wd),
            ("scalar", cfg.scalar_lr, cfg.adam_wd)) if (params := list(model.params_of(trained).values()))]
        self.small = [p for g in groups for p in g["params"]]
        self.adamw = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                       fused=rt.device.type == "cuda")
        self.base_lr = [g["lr"] for g in groups]

    def reduce_gradients(self) -> Tensor:
        """Sum gradients over ranks and clip them; returns the norm before clipping, a 0-dim tensor."""
        self.muon.start_reduce()
        used = [p for p in self.small if p.grad is not None]  # a blend, say, has no gradient until looping starts
        if self.rt.world > 1:  # the small ones travel as one flat vector
            flat = self.rt.sum_(torch.cat([p.grad.flatten() for p in used]))
            for p, grad in zip(used, flat.split([p.numel() for p in used])):
                p.grad = grad.view_as(p)
        shards, small = self.muon.finish_reduce(), [p.grad for p in used]
        square = self.rt.sum_(sum(s.square().sum() for s in shards)) + sum(g.square().sum() for g in small)
        norm = square.sqrt()
        if self.cfg.grad_clip_norm > 0:
            torch._foreach_mul_(shards + small, torch.clamp(self.cfg.grad_clip_norm / (norm + 1e-6), max=1.0))
        return norm

    def step(self, lr_scale: float, momentum: float) -> None:
        """One update from the reduced gradients; `lr_scale` multiplies every learning rate. Clears the gradients."""
        self.muon.step(lr_scale, momentum)
        for group, lr in zip(self.adamw.param_groups, self.base_lr):
            group["lr"] = lr * lr_scale
        self.adamw.step()
        for p in self.muon.params + self.small:
            p.grad = None


# ----------------------------------------------------------------------------------------------------------------------
# Training
#
# In: the model and batches. Out: trained, averaged weights within the training clock. Schedules are functions of the
# share of training that is done; the warm-up compiles everything before the clock starts.


def lr_factor(cfg: Settings, frac: float) -> float:
    """Learning-rate factor when the share `frac` of training is done: 1, then down in the last WARMDOWN_FRAC (PR 1395).

    linear: max(left / WARMDOWN_FRAC, MIN_LR); cosine: half a cosine between the same ends.
    """
    left = min(1.0, max(1.0 - frac, 0.0) / cfg.warmdown_frac) if cfg.warmdown_frac > 0 else 1.0
    if cfg.warmdown_shape == "cosine":
        return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 - math.cos(math.pi * left))
    return max(left, cfg.min_lr)


def muon_momentum(cfg: Settings, step: int) -> float:
    """Momentum at a step: linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    done = min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start + done * (cfg.muon_momentum - cfg.muon_momentum_warmup_start)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the schedules say for one step."""

    lr_scale: float = 1.0
    momentum: float = 0.95
    loops: int | None = None  # None: NUM_LOOPS
    window: int = 0  # tokens that attention spans; 0: TRAIN_SEQ_LEN
    qat: bool = False
    penalty: float = 0.0  # weight of QAT-lite's penalty
    snapshot: bool = False  # for SWA

    @classmethod
    def at(cls, cfg: Settings, step: int, frac: float, grown: int | None = None) -> "Schedule":
        """Step `step` (from 0), when the share `frac` of training is done; `grown`: the step at which windows grew."""
        scale, rise = lr_factor(cfg, frac), 1.0
        if grown is not None and step - grown < cfg.seq_change_warmup_steps:
            rise = (step - grown + 1) / cfg.seq_change_warmup_steps
        due = [loops for at, loops in cfg.loop_stages() if (step >= at if at > 1 else frac >= at)]
        start, penalty = cfg.qat_lite_start_frac, 0.0
        if cfg.qat_lite_enabled and frac >= start and step % cfg.qat_lite_every == 0:
            penalty = cfg.qat_lite_lambda * ((frac - start) / (1 - start) if start < 1 else 1.0)
        return cls(
            lr_scale=scale * rise, momentum=muon_momentum(cfg, step), loops=due[-1] if due else 0, penalty=penalty,
            window=[length for at, length in cfg.seq_stages() if frac >= at][-1],
            qat=cfg.qat_enabled and scale < cfg.qat_start_scale,
            snapshot="swa" in cfg.average and scale < cfg.swa_start_scale and (step + 1) % cfg.swa_every == 0)


def qat_lite_penalty(cfg: Settings, model: GPT) -> Tensor:
    """QAT-lite (PR 1894): what rounding would change in q and k of the later layers, squared. 0-dim.

    A mean of the matrices' means, in which layer i weighs (i + 1)^QAT_LITE_DEPTH_POWER. mse: (W - grid(W))²; clip: the
    excess over the grid's ends, squared; hybrid: half of both.
    """
    total, weights, bits, sigmas = 0.0, 0.0, cfg.qat_lite_bits, cfg.qat_lite_clip_sigmas
    for layer in range(cfg.qat_lite_layer_start, cfg.num_layers):
        depth = ((layer + 1) / cfg.num_layers) ** cfg.qat_lite_depth_power
        for w in (model.qo_bank[layer], model.kv_bank[layer]):
            parts = []
            if cfg.qat_lite_penalty != "clip":
                parts.append((w - on_grid(w.detach(), bits, sigmas)).square().mean())
            if cfg.qat_lite_penalty != "mse":
                limit = clip_scales(w.detach(), bits, sigmas).float()[:, None] * (2 ** (bits - 1) - 1)
                parts.append(F.relu(w.abs() - limit).square().mean())
            total, weights = total + depth * sum(parts) / len(parts), weights + depth
    return total / weights


class Trainer:
    """What one training step needs: the model, its compiled forward, optimizer and weight averages."""

    def __init__(self, cfg: Settings, rt: Runtime, model: GPT, forward: Callable, shards: dict[str, str] | None = None):
        """`shards`: the training text, as Windows.identity() has it."""
        self.cfg, self.rt, self.model, self.forward, self.shards = cfg, rt, model, forward, shards or {}
        self.plan, self.qat_hooks = StepPlan.of(cfg, rt.world), Hooks(fake_quant=fake_quantizer(cfg))
        self.reset()

    def reset(self) -> None:
        """Fresh optimizer and averages for the model's present weights."""
        self.optimizer = Optimizer(self.model, self.cfg, self.rt)
        self.params = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.params] if self.cfg.ema_decay > 0 else None
        self.swa, self.snapshots = None, 0
        self.window, self.grown = 0, None  # of the last step, and the step at which it last changed

    def schedule(self, step: int, frac: float) -> Schedule:
        """What the schedules say for the next step, `step`, when the share `frac` of training is done."""
        phase = Schedule.at(self.cfg, step, frac, self.grown)
        if self.window not in (0, phase.window):
            self.grown, phase = step, Schedule.at(self.cfg, step, frac, step)
        self.window = phase.window
        return phase

    def step(self, batches: list[Batch], phase: Schedule) -> Tensor:
        """Forward, backward and update over one global batch; returns this rank's share of the mean loss, 0-dim."""
        total = torch.zeros((), device=self.rt.device)
        hooks = self.qat_hooks if phase.qat else NO_HOOKS
        for ids, targets, bounds in batches:
            loss = self.forward(ids, targets, bounds=bounds, hooks=hooks, loops=phase.loops).sum()
            loss = loss / self.cfg.train_batch_tokens
            loss.backward()
            total += loss.detach()
        if phase.penalty:  # gradients are summed over ranks
            (phase.penalty / self.rt.world * qat_lite_penalty(self.cfg, self.model)).backward()
        # a gradient that is no number makes the loss none, so that no checkpoint is written of what follows from it
        total += 0 * self.optimizer.reduce_gradients()
        self.optimizer.step(phase.lr_scale, phase.momentum)
        now = [p.detach() for p in self.params]
        if self.ema is not None:
            torch._foreach_lerp_(self.ema, now, 1 - self.cfg.ema_decay)
        if phase.snapshot:  # the mean of the snapshots so far
            source = self.ema if "ema" in self.cfg.average else now
            self.swa, self.snapshots = self.swa or [torch.zeros_like(p) for p in now], self.snapshots + 1
            torch._foreach_lerp_(self.swa, source, 1 / self.snapshots)
        return total

    def use_average(self) -> str:
        """Put the weights that AVERAGE and EMA_BLEND ask for into the model; returns what they are."""
        name, source = ("swa", self.swa) if "swa" in self.cfg.average and self.swa else ("ema", self.ema)
        if source is None:
            return "the last step's weights"
        last = self.cfg.ema_blend if name == "ema" else 0.0
        torch._foreach_lerp_([p.detach() for p in self.params], source, 1 - last)
        if name == "swa":
            return f"{self.cfg.average} of {self.snapshots} snapshots"
        return f"ema, with {last:g} of the last step's weights" if last else "ema"

    def save(self, step: int, seconds: float) -> None:
        """Write checkpoint.pt atomically: everything a run needs to go on as if it had not stopped.

        Training draws no random numbers: the data order follows from SEED and the position, which is the step.
        """
        momentum = self.optimizer.muon.state()
        if self.rt.rank == 0:
            content = {
                "step": step, "seconds": seconds, "settings": must_match(self.cfg), "shards": self.shards,
                "params": [p.detach() for p in self.params], "muon": momentum,
                "adamw": self.optimizer.adamw.state_dict(), "ema": self.ema, "swa": self.swa,
                "snapshots": self.snapshots, "window": self.window, "grown": self.grown}
            save_tensors(self.rt, "checkpoint.pt", content, f"no checkpoint at step {step}")  # the last is still there
        self.rt.largest(0.0)  # or the others would wait for rank 0 with their clocks running

    def load(self) -> tuple[int, float]:
        """Take up checkpoint.pt; returns its step and clock seconds. RunError if it is missing or of another run."""
        path = self.rt.path("checkpoint.pt")
        with refuse(f"{path}: not a whole checkpoint", detail=False):
            saved = read_checkpoint(self.cfg, path, self.shards, self.rt.device)
            torch._foreach_copy_([p.detach() for p in self.params], saved["params"])
            self.optimizer.muon.load(saved["muon"])
            self.optimizer.adamw.load_state_dict(saved["adamw"])
            self.ema, self.swa, self.snapshots = saved["ema"], saved["swa"], saved["snapshots"]
            self.window, self.grown = saved["window"], saved["grown"]
            return saved["step"], saved["seconds"]


def must_match(cfg: Settings) -> dict[str, Any]:
    """Settings that a resumed run shares with the one that wrote the checkpoint: all but those of when to stop."""
    free = ("iterations", "max_wallclock_seconds", "warmup_steps", "micro_batch_tokens")
    names = ["vocab_size", "bos_id", *Settings.group("model", "train", "quant"), "row_tokens", "seed"]
    return {name: getattr(cfg, name) for name in names if name not in free and not name.startswith("gptq")}


@contextmanager
def refuse(fault: str, detail: bool = True) -> Iterator[None]:
    """RunError with this `fault` where what a file holds breaks its readers, whatever they raise (Rust panics too)."""
    try:
        yield
    except (RunError, PermissionError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise RunError(f"{fault} ({type(e).__name__}{f': {e}' if detail else ''})") from None


def read_checkpoint(cfg: Settings, path: str, shards: dict[str, str], device: torch.device) -> dict[str, Any]:
    """A checkpoint that this run can go on from. RunError if it is missing, damaged or of another run."""
    if not os.path.exists(path):
        raise RunError(f"RESUME=1: no {path}; ARTIFACT_DIR takes the folder of a run with CHECKPOINT_EVERY")
    with refuse(f"{path}: not a whole checkpoint", detail=False):
        saved = torch.load(path, map_location=device, weights_only=True)
        for name, value in must_match(cfg).items():
            if (was := saved["settings"].get(name)) != value:
                if name == "row_tokens":
                    raise RunError(f"{path}: made with rows of {was} tokens, this run's have {value}; takes "
                                   f"MICRO_BATCH_TOKENS={was}")
                raise RunError(f"{path}: made with {name.upper()}={was}, this run has {value}")
        if other := min(saved["shards"].items() ^ shards.items(), default=None):
            was, now = (found.get(other[0], "absent") for found in (saved["shards"], shards))
            raise RunError(f"{path}: made with other training text; {other[0]} was {was}, is {now}")
        if saved["step"] > (cfg.iterations or math.inf):
            raise RunError(f"ITERATIONS={cfg.iterations}: {path} has {saved['step']} steps already")
        return saved


def graphs_of(cfg: Settings) -> list[Schedule]:
    """Steps that between them need every graph of training: each number of loops with each window it meets."""
    stages = [at for at, _ in [*cfg.loop_stages(), *cfg.seq_stages()]]
    met = [Schedule.at(cfg, step, share) for step in {0, *(int(at) + 1 for at in stages if at > 1)}
           for share in {0.0, *(at for at in stages if at <= 1)}]
    return [Schedule(loops=loops, window=window, qat=qat) for qat in ((False, True) if cfg.qat_enabled else (False,))
            for loops, window in sorted({(phase.loops, phase.window) for phase in met})]


def warm_up(cfg: Settings, rt: Runtime, trainer: Trainer) -> tuple[float, float]:
    """Compile every graph that training needs on random tokens, then put everything back.

    Returns the seconds to keep for calibration, GPTQ_RESERVE_SECONDS or measured here, and those of the last step.
    """
    generator = torch.Generator().manual_seed(cfg.seed)

    def random_batch(rows: int, length: int, window: int) -> Batch:
        ids, targets = torch.randint(cfg.vocab_size, (2, rows, length), generator=generator)
        return Batch.of(cfg, ids, targets, trainer.model.bos, window).to(rt.device)

    initial = [p.detach().clone() for p in trainer.params]
    lap, plan = 0.0, trainer.plan
    count = min(2, cfg.warmup_steps) if trainer.forward is trainer.model else cfg.warmup_steps  # nothing to compile
    for phase in graphs_of(cfg) if count else ():
        laps = []
        for _ in rt.progress(range(count), f"warm-up, {phase.loops} loops"):
            batches = [random_batch(plan.size, cfg.row_tokens, phase.window) for _ in range(plan.micro)]
            start = time.perf_counter()
            with rt.host_waits() as waits:
                trainer.step(batches, phase)
            rt.sync()
            laps.append(time.perf_counter() - start)
        lap = laps[-1] if len(laps) > 1 else 0.0  # a first step compiles
        rt.note(f"warm-up: {phase.loops} loops{f', windows of {phase.window}' if cfg.train_seq_schedule else ''}"
                f"{', qat' if phase.qat else ''}: first step {laps[0]:.2f}s, last one "
                f"{laps[-1]:.3f}s, in which the host waited for the GPU at: {', '.join(waits) or 'no line'}")
    reserve = cfg.gptq_reserve_seconds
    if cfg.gptq_calibration != "train" or not cfg.max_wallclock_seconds:
        reserve = 0.0  # off the clock
    elif cfg.warmup_steps or reserve is None:  # what its first pass costs must not fall on the clock
        measured = calibration_seconds(cfg, rt, trainer.model, random_batch(
            cfg.micro_batch_tokens // cfg.row_tokens, cfg.row_tokens, cfg.train_seq_len))
        reserve = measured if reserve is None else reserve
    for p, value in zip(trainer.params, initial):
        p.detach().copy_(value)
    trainer.reset()
    return reserve, rt.largest(lap)


def calibration_seconds(cfg: Settings, rt: Runtime, model: GPT, batch: Batch) -> float:
    """Seconds to keep for calibration, at most half of the clock: one batch's time over all that a rank reads."""
    stats, times = Statistics.empty(cfg, model), []
    for _ in range(2):  # the first pays for allocation
        rt.sync()
        start = time.perf_counter()
        add_statistics(model, stats, batch)
        rt.sync()
        times.append(time.perf_counter() - start)
    return min(rt.largest(1.2 * times[-1] * -(-cfg.gptq_calibration_batches // rt.world) + 0.2),
               0.5 * cfg.max_wallclock_seconds)


def train(cfg: Settings, rt: Runtime, trainer: Trainer, feeder: Feeder, clock: Clock, validate: Callable,
          step: int = 0) -> int:
    """Train from `step` until the clock or ITERATIONS says stop; returns the number of steps. RunError on NaN."""
    phase, pending, first, share, latest = Schedule(), [], step, 0.0, ""
    bar = tqdm(total=1.0, desc="training", leave=False, disable=None if rt.rank == 0 else True,
               bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}")  # in a file a line every tenth instead
    clock.start()
    while True:
        now = clock.tick()
        last = (cfg.iterations and step >= cfg.iterations) or not clock.allows_step()
        save = step > first and cfg.checkpoint_every and step % cfg.checkpoint_every == 0
        if pending and (last or save or step <= 5 or step % cfg.train_log_every == 0):
            latest, pending = log_losses(cfg, rt, pending, step, now, phase), []
        if step > first and cfg.val_loss_every and step % cfg.val_loss_every == 0 and not last:
            clock.stop()
            validate(step, phase.loops)  # before this step's checkpoint, from which a run that was ended goes on
            clock.start()
        if save:  # after the losses are known to be numbers
            clock.stop()
            trainer.save(step, clock.spent)
            clock.start()
        if last and step == 0:
            raise RunError(f"MAX_WALLCLOCK_SECONDS={clock.limit:g}: too short for one step of {clock.lap:.1f}s and "
                           f"{clock.reserve:.1f}s of calibration")
        if last:
            bar.close()
            if step > first and cfg.num_loops and phase.loops != cfg.num_loops:
                rt.log(f"NOT TRAINED as it will be scored: no step had NUM_LOOPS={cfg.num_loops}, the last had "
                       f"{phase.loops}; lower ENABLE_LOOPING_AT or LOOP_SCHEDULE's last stage, or set NUM_LOOPS=0")
            return step
        frac = step / cfg.iterations if cfg.iterations else 0.0
        if clock.limit:
            frac = max(frac, now / (clock.limit - clock.reserve))
        before, share = share, min(frac, 1.0)
        if share:
            state = f"step {step}, {latest}, {now * (1 - share) / share:.0f} s left"
            bar.set_postfix_str(state, refresh=False)
            bar.update(share - before)
            if bar.disable and int(10 * share) > int(10 * before):
                rt.log(f"training {int(10 * share)}0 %: {state}")
        phase = trainer.schedule(step, share)
        pending.append(trainer.step(feeder.next(phase.window), phase))
        rt.throttle()
        step += 1


def log_losses(cfg: Settings, rt: Runtime, losses: list[Tensor], step: int, now: float, phase: Schedule) -> str:
    """Log the last of the steps whose `losses` (0-dim, this rank's share) end at `step`, and return it in short;
    RunError if one is not finite.

    This is the one place where a training step waits for the GPU.
    """
    values = rt.sum_(torch.stack(losses)).tolist()
    bad = next((i for i, loss in enumerate(values) if not math.isfinite(loss)), None)
    if bad is not None:
        saved = os.path.exists(rt.path("checkpoint.pt"))
        raise RunError(f"train_loss is {values[bad]} at step {step - len(values) + bad + 1}; "
                       f"{'the last good checkpoint is ' + rt.path('checkpoint.pt') if saved else 'no checkpoint'}; "
                       "lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR")
    tokens = step * cfg.train_batch_tokens
    rt.note(f"step:{step}/{cfg.iterations or '-'} train_loss:{values[-1]:.4f} train_time:{now * 1e3:.0f}ms "
            f"step_avg:{now / step * 1e3:.2f}ms tok/s:{tokens / now:,.0f} lr:{phase.lr_scale:.3f}"
            f"{f' loops:{phase.loops}' if phase.loops else ''}"
            f"{f' window:{phase.window}' if cfg.train_seq_schedule else ''}{' qat' if phase.qat else ''}")
    rt.metric(step=step, train_loss=values[-1], lr_scale=phase.lr_scale, tokens=tokens, seconds=now,
              tok_per_s=tokens / now)
    return f"train_loss {values[-1]:.4f} at step {step}, {tokens / now:,.0f} tok/s"


# ----------------------------------------------------------------------------------------------------------------------
# Calibration
#
# In: the trained model and some text. Out: for each group of matrices the second moments of its inputs and of its
# output's gradients, summed over processes.


@dataclasses.dataclass(frozen=True)
class QuantGroup:
    """Matrices that are quantized alike: `count` slices of a bank from `first` on, or a parameter of one matrix."""

    name: str  # also the role of their projection
    param: str
    hessian: str | None  # role whose inputs they share; None: no product has them as a factor
    bits: int  # of SDClip's grid, as is the next; of a gate
    sigmas: float = 0.0
    first: int = 0
    count: int = 0  # 0: one matrix
    kind: str = "matrix"  # table: rows are looked up by token; head; gate: rounded to the nearest, however small

    def view(self, param: Tensor) -> Tensor:
        """(count or 1, rows, cols) of its parameter."""
        return param[self.first : self.first + self.count] if self.count else param[None]


def quant_groups(cfg: Settings) -> list[QuantGroup]:
    """All matrices of the model by role; together they cover the banks, the tables and the gates."""
    n, bits, embed = cfg.num_layers, cfg.matrix_bits, (cfg.embed_bits, cfg.embed_clip_sigmas)
    attn, mlp = (bits, cfg.attn_clip_sigmas), (bits, cfg.mlp_clip_sigmas)
    groups = [
        QuantGroup("q", "qo_bank", "q", *attn, 0, n),
        QuantGroup("o", "qo_bank", "o", *attn, n, n),
        QuantGroup("k", "kv_bank", "q", *attn, 0, n),
        QuantGroup("v", "kv_bank", "q", *attn, n, n),
        QuantGroup("up", "mlp_up_bank", "up", *mlp, 0, n),
        QuantGroup("down", "mlp_down_bank", "down", *mlp, 0, n),
        QuantGroup("emb", "tok_emb", "head" if cfg.tie_embeddings else None, *embed, kind="table"),
    ]
    if not cfg.tie_embeddings:
        groups.append(QuantGroup("head", "head", "head", *embed, kind="head"))
    for name, on in (("embed_in", cfg.embedding_dim), ("embed_out", cfg.embedding_dim),
                     ("bigram", cfg.bigram_vocab_size), ("ve", cfg.ve_enabled and cfg.ve_dim)):
        if on:
            groups.append(QuantGroup(name, f"{name}_bank", name, bits, cfg.matrix_clip_sigmas, 0, 1))
    for name, on in (("bigram_table", cfg.bigram_vocab_size), ("ve_table", cfg.ve_enabled),
                     ("ve_bigram_table", cfg.ve_enabled and cfg.ve_bigram_rows)):
        if on:
            groups.append(QuantGroup(name, name, None, *embed, kind="table"))
    if cfg.gated_attn_enabled or cfg.sparse_attn_gate_enabled or cfg.attn_out_gate_enabled:
        groups.append(QuantGroup("attn_gate", "attn_gate", None, 8, 0.0, 0, n, kind="gate"))
    return groups


CALIBRATION_TOKENS = 16384  # that a backward pass of calibration holds at a time: it is not compiled, and takes memory


class Statistics(NamedTuple):
    """What calibration text says of the matrices, summed over tokens."""

    hessians: dict[str, Tensor]  # role -> (layers, in, in) fp32: Σ x xᵀ of each input that some matrix reads
    moments: dict[str, Tensor]  # group -> (layers, rows) fp32: Σ of squared gradients of its outputs; empty for SDClip
    tokens: int = 0

    @classmethod
    def empty(cls, cfg: Settings, model: GPT) -> "Statistics":
        """Of no text: zeros for every matrix of the model; a tied embedding has moments as a table and as the head."""
        params, hessians, moments = dict(model.named_parameters()), {}, {}
        for group in quant_groups(cfg):
            weight = group.view(params[group.param].detach())
            n, rows, cols = weight.shape
            if group.hessian:
                hessians[group.hessian] = weight.new_zeros(n, cols, cols)
            if cfg.quant_allocation == "auto" and group.kind != "gate":
                names = ("emb", "head") if group.name == "emb" else (group.name,)
                moments |= {name: weight.new_zeros(n, rows) for name in names}
        return cls(hessians, moments)


def add_statistics(model: GPT, stats: Statistics, batch: Batch) -> None:
    """Add what the tokens of a batch say, all visits of a layer; moments take the gradient of the summed loss."""
    hooks = Hooks(hessians=stats.hessians, moments=stats.moments)
    if model.dtype == torch.bfloat16:  # products of bf16 values are exact in TF32
        torch.set_float32_matmul_precision("high")
    if stats.moments:  # gradients of the tables pass through every layer, and so through every hook
        tables = list(model.params_of("embedding", "head").values())
        rows = max(1, CALIBRATION_TOKENS // batch.ids.size(1))
        for ids, targets in zip(batch.ids.split(rows), batch.targets.split(rows)):
            bounds = batch.bounds and Bounds.find(ids, model.bos, batch.bounds.max_len)
            torch.autograd.grad(model(ids, targets, bounds, hooks).sum(), tables, allow_unused=True)
    else:
        with torch.no_grad():
            model(batch.ids, bounds=batch.bounds, hooks=hooks)
    torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def sample_text(cfg: Settings, model: GPT, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """(rows, length) int64 tokens that the model itself draws at temperature 0.8, in documents of 128 tokens that begin
    with BOS. Short ones: reading each anew for every token then costs less than the parts of a key/value cache would.
    """
    size, start = min(128, length), max(model.bos, 0)
    documents = torch.full((-(-rows * length // size), size), start, device=model.tok_emb.device)
    for part in documents.split(max(1, cfg.micro_batch_tokens // size)):
        for t in range(1, size):
            width = min(size, -(-t // 32) * 32)  # few shapes; what stands after t is not seen
            odds = (model(part[:, :width])[:, t - 1] / 0.8).softmax(-1).cpu()
            part[:, t] = torch.multinomial(odds, 1, generator=generator)[:, 0].to(part.device)
    return documents.flatten()[: rows * length].view(rows, length)


def calibrate(cfg: Settings, rt: Runtime, model: GPT, windows: Windows, first: int, clock: Clock) -> Statistics:
    """Statistics summed over all ranks, from the training rows that come next, `first` on, from text that the model
    draws, or from random tokens.

    Batches are dealt to ranks one by one, so the sum does not depend on how many there are. Training text is read on
    the running clock: after the first round, one that would not end in time is left out.
    """
    stats = Statistics.empty(cfg, model)
    longest, done = 0.0, 0
    rows = cfg.micro_batch_tokens // cfg.row_tokens
    generator = torch.Generator()
    for round_ in rt.progress(range(-(-cfg.gptq_calibration_batches // rt.world)), "calibration"):
        before = rt.largest(clock.seconds())
        if clock.limit and round_ and before + longest > clock.limit and cfg.gptq_calibration == "train":
            rt.log(f"calibration: the clock ends after {done} of {cfg.gptq_calibration_batches} batches")
            break
        batch = round_ * rt.world + rt.rank
        if batch < cfg.gptq_calibration_batches:
            if cfg.gptq_calibration == "train":
                drawn = windows.batch(first + batch * rows, rows, rows)
            else:
                generator.manual_seed(batch if cfg.gptq_calibration == "self" else cfg.seed + batch)
                if cfg.gptq_calibration == "self":
                    ids = sample_text(cfg, model, rows, cfg.row_tokens + 1, generator)
                else:
                    ids = torch.randint(cfg.vocab_size, (rows, cfg.row_tokens + 1), generator=generator).to(rt.device)
                ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
                drawn = Batch.of(cfg, ids, targets, model.bos, cfg.train_seq_len)
            add_statistics(model, stats, drawn)
        rt.sync()
        longest = max(longest, rt.largest(clock.seconds()) - before)
        done = min((round_ + 1) * rt.world, cfg.gptq_calibration_batches)
    for total in (*stats.hessians.values(), *stats.moments.values()):
        rt.sum_(total)
    return stats._replace(tokens=done * rows * cfg.row_tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Rounding
#
# In: matrices, a grid for each, and the second moments of their inputs. Out: integers on these grids, by GPTQ or by a
# trellis. Here it is decided how errors make up for each other, not which grid a matrix has.


def clip_scales(weight: Tensor, bits: int, sigmas: float) -> Tensor:
    """SDClip (PR 1394): step of each row's symmetric grid, (..., rows) fp16, for weight (..., rows, cols).

    It follows from the row's standard deviation, the unbiased one.
    """
    scale = sigmas * weight.float().std(dim=-1) / (2 ** (bits - 1) - 1)
    return scale.clamp(2.0**-14, 60000.0).half()  # the least normal fp16: rows of zeros get a step too


def fake_quantizer(cfg: Settings) -> Callable[[Tensor, Site], Tensor]:
    """Late QAT's hook: weights rounded to the grid that quantize() will use, gradients passed straight through."""
    groups = {group.name: group for group in quant_groups(cfg)}

    def fake_quant(weight: Tensor, site: Site) -> Tensor:
        group = groups.get("emb" if site.role == "head" and cfg.tie_embeddings else site.role)
        if group is None or weight.numel() < cfg.quant_min_weights:
            return weight
        # the grid's value exactly, since w - w is 0, and the gradient of w
        return on_grid(weight.detach(), group.bits, group.sigmas) + (weight - weight.detach())

    return fake_quant


def on_grid(weight: Tensor, bits: int, sigmas: float) -> Tensor:
    """weight (..., rows, cols) rounded to the nearest point of SDClip's grid."""
    levels, step = 2 ** (bits - 1) - 1, clip_scales(weight, bits, sigmas).float()[..., None]
    return (weight / step).round().clamp(-levels, levels) * step


Factors = tuple[Tensor, Tensor]  # of a Hessian, by `factorize`


def factorize(hessian: Tensor, sort: bool = True) -> Factors:
    """Column order (n, cols), descending diag(H), and in it the upper Cholesky factor of H⁻¹, (n, cols, cols) fp32.

    hessian (n, cols, cols) = Σ x xᵀ; 1 % of the mean diagonal is added to it. Not sorted: columns as they stand. For
    weighted steps, which follow the factor, the order makes no difference, and a trellis runs along it.
    """
    diagonal = hessian.double().diagonal(dim1=-2, dim2=-1)
    order = torch.arange(hessian.size(-1), device=hessian.device).expand_as(diagonal)
    if sort:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
    h = hessian.double().gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    mean = diagonal.mean(-1, keepdim=True)
    h.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, 0.01 * mean, 1.0))
    # H⁻¹ = UᵀU with U upper: factor H with rows and columns reversed, then invert the triangle
    lower = torch.linalg.cholesky(h.flip(-1, -2))
    eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device).expand_as(h)
    return order, torch.linalg.solve_triangular(lower, eye, upper=False).flip(-1, -2).float()


def factorize_all(hessians: dict[str, Tensor], sort: bool = True) -> dict[str, Factors]:
    return {role: factorize(hessian, sort) for role, hessian in hessians.items()}


def gptq(weight: Tensor, factors: Factors, scale: Tensor, bits: int, block: int = 128) -> Tensor:
    """Codes, (n, rows, cols) within ±(2^(bits-1) - 1), that keep weight @ x close (GPTQ, arXiv 2210.17323); int8, or
    int16 of more than 8 bits.

    weight (n, rows, cols); factors of Σ x xᵀ (n, cols, cols); scale, the grid's step, (n, rows) or (n, rows, cols).
    Each column's rounding error is passed on to those after it in the order of `factorize`.
    """
    levels, (order, upper) = 2 ** (bits - 1) - 1, factors
    w = weight.float().gather(2, order[:, None].expand_as(weight))
    steps = scale.float() if scale.ndim == 3 else scale.float()[..., None].expand_as(weight)
    steps = steps.gather(2, order[:, None].expand_as(weight))
    codes = torch.empty_like(w, dtype=torch.int8 if bits <= 8 else torch.int16)
    for start in range(0, w.size(2), block):
        stop = min(start + block, w.size(2))
        errors = torch.empty_like(w[:, :, start:stop])
        for j in range(start, stop):
            step = steps[:, :, j]
            code = (w[:, :, j] / step).round_().clamp_(-levels, levels)
            codes[:, :, j] = code.to(codes.dtype)
            error = (w[:, :, j] - code * step) / upper[:, None, j, j]
            w[:, :, j + 1 : stop] -= error[:, :, None] * upper[:, j, None, j + 1 : stop]
            errors[:, :, j - start] = error
        w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes)


# The trellis of eight states of JPEG 2000 (ISO/IEC 15444-2). At a state a code is even or odd as its number is; the
# next state is here, by bit 1 of the code. So the ways into a state t are from t // 2 and from t // 2 + 4.
STATE_AFTER = ((0, 1), (2, 3), (5, 4), (7, 6), (1, 0), (3, 2), (4, 5), (6, 7))
CACHED_ROWS = 2048  # whose survivors a core's caches hold


def trellis(weight: Tensor, upper: Tensor, step: Tensor) -> Tensor:
    """Codes (n, rows, cols) int16 along each row by trellis-coded quantization (Marcellin and Fischer, 1990), errors
    being passed on as GPTQ does.

    weight (n, rows, cols); step (n, cols), of the finer grid, which the codes of both parities make; upper (n, cols,
    cols), the factor of columns as they stand. A code's parity is given by those before it, so that it takes the bits
    of a grid of double steps. Its error is 1 dB below that grid's, since many codes are chosen together.
    """
    if weight.device.type != "cpu":
        return round_rows(weight, upper, step)
    codes, together = torch.empty_like(weight, dtype=torch.int16), max(1, CACHED_ROWS // weight.size(1))
    pieces = [(slice(i, i + together), slice(first, first + CACHED_ROWS)) for i in range(0, len(weight), together)
              for first in range(0, weight.size(1), CACHED_ROWS)]

    def run(piece: tuple[slice, slice]) -> None:
        codes[piece] = round_rows(weight[piece], upper[piece[0]], step[piece[0]])

    on_threads(run, pieces, weight.device)
    return codes


def on_threads(run: Callable[[Any], None], pieces: Iterable, device: torch.device) -> None:
    """run() each of these pieces; on a CPU side by side, a thread each."""
    if device.type != "cpu":
        for piece in pieces:
            run(piece)
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(run, pieces))
    torch.set_num_threads(threads)


@torch.no_grad()
def round_rows(weight: Tensor, upper: Tensor, step: Tensor, block: int = 128) -> Tensor:
    """trellis(), all rows at once. The codes of `block` columns are chosen together."""
    w, codes = weight.float().mT.contiguous(), []
    state = torch.zeros_like(w[:, 0], dtype=torch.int64)
    for start in range(0, w.size(1), block):
        here = slice(start, start + block)
        errors, state = best_path(w[:, here], upper[:, here, here], step[:, here], state)
        spread = upper[:, here, here].mT @ errors  # what they add to each column of the block, their own one included
        codes.append(((w[:, here] - spread) / step[:, here, None]).round().to(torch.int16))
        w[:, start + block :] -= upper[:, here, start + block :].mT @ errors
    return torch.cat(codes, 1).mT.contiguous()


def best_path(w: Tensor, upper: Tensor, step: Tensor, state: Tensor, short: int = 16) -> tuple[Tensor, Tensor]:
    """Errors over diag(upper), (n, cols, rows), of the codes for w (n, cols, rows) whose squares have the least sum,
    and the states (n, rows) that they end in; by Viterbi's algorithm from `state` on.

    Each of the eight survivors has errors of its own, and so another rest of its row to round. They are kept up to
    date within `short` columns, and over those by one product.
    """
    (n, cols, rows), device = w.shape, w.device
    states = torch.arange(8, device=device)[:, None]
    swap = torch.tensor([after[0] % 2 for after in STATE_AFTER], device=device, dtype=torch.int32)[:, None]
    cell = (2 * step / upper.diagonal(dim1=-2, dim2=-1))[..., None, None]
    cost = torch.full((n, 8, rows), math.inf, device=device).scatter_(1, state[:, None], 0.0)
    errors = w.new_empty(n, 8, rows, 0)  # of the survivors, in the order of their states
    for first in range(0, cols, short):
        last = min(first + short, cols)
        rest = w[:, first:last, None].expand(n, last - first, 8, rows)
        if first:
            rest = rest - (errors @ upper[:, None, :first, first:last]).movedim(3, 1)
        ways, found = [], []
        for j in range(first, last):
            place = rest[:, 0] * (0.5 / step[:, j, None, None]) - states % 2 / 2  # its codes are at the integers
            code = place.round()
            near = place - code
            far, odd = near - torch.copysign(torch.ones_like(near), near), ((code.to(torch.int32) ^ swap) & 1).bool()
            error = torch.stack((torch.where(odd, far, near), torch.where(odd, near, far)), 2).mul_(cell[:, j, None])
            total = cost[:, :, None] + error.square()  # (n, 8, 2, rows): of the way to the first, to the second state
            ways.append(total[:, 4:] < total[:, :4])
            cost = torch.where(ways[-1], total[:, 4:], total[:, :4]).flatten(1, 2)
            found.append(torch.where(ways[-1], error[:, 4:], error[:, :4]).flatten(1, 2))
            if j + 1 < last:
                kept = torch.where(ways[-1][:, None], rest[:, 1:, 4:, None], rest[:, 1:, :4, None]).flatten(2, 3)
                rest = kept - found[-1][:, None] * upper[:, j, j + 1 : last, None, None]
        ancestor = states.expand(n, 8, rows)
        for k in reversed(range(last - first)):
            found[k] = found[k].gather(1, ancestor)
            ancestor = (ancestor >> 1) + 4 * ways[k].flatten(1, 2).gather(1, ancestor)
        old = (ancestor + 8 * torch.arange(n, device=device)[:, None, None]) * rows + torch.arange(rows, device=device)
        errors = torch.cat((errors.flatten(0, 2)[old.flatten()].view(n, 8, rows, first), torch.stack(found, 3)), 3)
    state = cost.argmin(1)
    return errors.gather(1, state[:, None, :, None].expand(n, 1, rows, cols))[:, 0].mT, state


# ----------------------------------------------------------------------------------------------------------------------
# Quantization
#
# In: weights, and the statistics of calibration. Out: integers with step sizes, which the statistics (auto) or each
# row's spread (sdclip) give, and the weights that they stand for.


def octaves(exponents: Tensor) -> Tensor:
    """2^(k/4), fp32, for int8 k (...): by a table of square roots, which every machine rounds alike."""
    half, quarter = math.sqrt(2.0), math.sqrt(math.sqrt(2.0))
    powers = [2.0 ** (k // 4) * (1.0, quarter, half, half * quarter)[k % 4] for k in range(-128, 128)]
    return torch.tensor(powers, dtype=torch.float32, device=exponents.device)[exponents.long() + 128]


class Curvature(NamedTuple):
    """How sensitive the loss is to a group's weights: an error E_ij costs ½ (2^row_i 2^(col_j/4) E_ij)² nats."""

    row: Tensor  # (n, rows) fp32, log2
    col: Tensor  # (n, cols) int8, quarters of an octave
    least: Tensor  # (n, rows) fp32, log2: steps whose halves keep codes within int16, over those of the columns


@torch.no_grad()
def curvatures(cfg: Settings, state: dict[str, Tensor], stats: Statistics,
               factors: dict[str, Factors]) -> dict[str, Curvature]:
    """The Kronecker-factored Fisher information of every group that is quantized. Its factors are F_i = E[g_i²] for a
    row, g being the gradient of its output, and for a column d_j² = 1/U_jj², U being GPTQ's factor of H = E[xxᵀ]. We
    derived it ourselves. It needs nothing but the calibration pass.

    A table's row has the squared gradients of all its lookups. A tied embedding has those and its part as the head.
    The text to be scored looks up rows that calibration did not: each row of a table counts as looked up half a time
    more (Krichevsky and Trofimov's estimate). Rows of other matrices get 1 % of the average on top.
    """
    visits = Counter(layer for layer, _ in virtual_layers(cfg, cfg.num_loops))
    found = {}
    for group in quant_groups(cfg):
        weight = group.view(state[group.param]).float()
        if weight[0].numel() < cfg.quant_min_weights or group.kind == "gate":
            continue
        n, rows, cols = weight.shape
        unseen = 0.5 * rows / stats.tokens if group.kind == "table" else 0.01
        squared, col = torch.zeros(n, rows, device=weight.device), torch.zeros(n, cols, device=weight.device)
        if group.hessian:
            order, upper = factors[group.hessian]
            col.scatter_(1, order, -upper.diagonal(dim1=-2, dim2=-1).log2() - 0.5 * math.log2(stats.tokens))
            squared += stats.moments["head" if group.name == "emb" else group.name] / stats.tokens
            if group.name in ("q", "o", "k", "v", "up", "down"):  # of layers
                squared /= torch.tensor([visits[i] for i in range(n)], device=weight.device)[:, None]
            squared += unseen * squared.mean(-1, keepdim=True)
            mean = stats.hessians[group.hessian].diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) / stats.tokens
        if group.kind == "table":
            read = stats.moments[group.name] / stats.tokens
            read += unseen * read.mean(-1, keepdim=True)
            squared += read / mean if group.hessian else read
        col = (4 * col).round()
        least = ((weight.abs() * (2.0 ** (col / 4))[:, None]).amax(2) / 15000).clamp(min=2.0**-30).log2()
        found[group.name] = Curvature(0.5 * squared.clamp(min=1e-30).log2(), col.to(torch.int8), least)
    return found


def weighted_steps(curvature: Curvature, finest: float) -> tuple[Tensor, Tensor]:
    """Steps at which every weight's error costs the same: exponents by row and column, int8, of 2^((row + col)/4), for
    c = 2^finest.

    Rows of tokens that calibration never met are all equally sensitive. If they were rounded alike, they would all take
    their next step at one c, and the artifact's size would jump there. So each row is rounded with another offset (the
    golden section times its number).
    """
    rows = torch.arange(curvature.row.size(1), device=curvature.row.device)
    row = (4 * (finest - curvature.row) + rows * 0.6180339887 % 1).floor()
    return torch.maximum(row, (4 * curvature.least).ceil()).clamp(-123, 127).to(torch.int8), -curvature.col


COMMON_RANK, COMMON_UNIT = 2, 256


def common_part(table: Tensor) -> tuple[Tensor, Tensor]:
    """Factors, int8 (rank, rows) within ±15 and int16 (rank, cols), of the largest singular parts of a table (rows,
    cols) in units of its steps; zeros where they would not pay for themselves.

    Rows of rare tokens are nearly the same. If each was rounded by itself, they would all have the same error, and the
    logits of all rare tokens would move together, which costs much more than F says. If each was coded by itself, they
    would repeat what they have in common.
    """
    table, size = table.float(), table.float().norm(dim=1, keepdim=True)
    short = table * (2 * size.median() / size.clamp(min=1e-9)).clamp(max=1)  # rows with fine steps must not lead
    right = torch.linalg.eigh((short.T @ short).double()).eigenvectors[:, -COMMON_RANK:].float().flip(1)
    most = (short @ right).abs().amax(0).clamp(min=1e-9)
    left = (15 * (table @ right) / most).round().clamp(-15, 15)
    right = (COMMON_UNIT / 15 * most * right).round().clamp(-32767, 32767)
    rest = table - left @ right.T / COMMON_UNIT
    saved = table.size(1) * torch.log2(size[:, 0].clamp(min=1e-9) / rest.norm(dim=1).clamp(min=1e-9)).sum()  # bits
    pays = float(saved) > 5 * COMMON_RANK * sum(table.shape)
    return (pays * left.T).to(torch.int8).contiguous(), (pays * right.T).to(torch.int16).contiguous()


class Stored(NamedTuple):
    """Something as the artifact holds it: a form, the sizes that it has there, and its parts."""

    form: str
    sizes: list[int]
    parts: dict[str, Tensor]

    @property
    def chained(self) -> bool:
        """Whether the parity of its codes follows from those before them."""
        return self.form.startswith("trellis")


def form_parts(form: str, sizes: list[int]) -> dict[str, tuple[list[int], torch.dtype]]:
    """The table of how things are stored: for a form and its sizes the shape and dtype of each part.

    half: any tensor. scaled, of each kind of group: codes times a step for each row, as SDClip has it. weighted: steps
    2^((row + col)/4); of a table also factors of what its rows have in common. trellis: the same, of codes whose parity
    those before them in the row give, which only `ans` makes use of. gate: levels times a step for each row.
    low rank: a part of a matrix's error by LQER, two factors of which `group` numbers share a step and a least value.
    """
    if form == "half":
        return {"values": (sizes, torch.float16)}
    if form == "low rank":
        rank, rows, cols, group = sizes
        return {"left": ([rank, rows], torch.int8), "left_grid": ([2, rank, -(-rows // group)], torch.float16),
                "right": ([rank, cols], torch.int8), "right_grid": ([2, rank, -(-cols // group)], torch.float16)}
    n, rows, cols = sizes
    scaled = {"codes": (sizes, torch.int8), "scales": ([n, rows], torch.float16)}
    weighted = {"codes": (sizes, torch.int16), "row": ([n, rows], torch.int8), "col": ([n, cols], torch.int8)}
    common = {"left": ([COMMON_RANK, rows], torch.int8), "right": ([COMMON_RANK, cols], torch.int16)}
    return {"scaled matrix": scaled, "scaled table": scaled, "scaled head": scaled, "weighted matrix": weighted,
            "weighted table": weighted | common, "weighted head": weighted, "trellis matrix": weighted,
            "trellis table": weighted | common, "trellis head": weighted,
            "gate": {"levels": scaled["codes"], "scales": scaled["scales"]}}[form]


COMMON_APART = ("scaled table", "scaled head", "weighted head")  # forms whose common part only `ans` takes out


def stored_half(tensor: Tensor) -> Stored:
    return Stored("half", list(tensor.shape), {"values": tensor.half()})


def even_grid(factor: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes (rank, n) int8 from 0 to 2^bits - 1 for a factor (rank, n), and steps and least values of every `group`
    numbers of a row, (2, rank, groups) fp16.
    """
    parts = F.pad(factor, (0, -factor.size(1) % group), mode="replicate").unflatten(1, (-1, group))
    least = parts.amin(-1).half()
    step = ((parts.amax(-1) - least.float()) / (2**bits - 1)).clamp(min=2.0**-14).half()
    codes = ((parts - least.float()[..., None]) / step.float()[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1)[:, : factor.size(1)].to(torch.int8), torch.stack((step, least))


def from_even_grid(codes: Tensor, grid: Tensor, group: int) -> Tensor:
    """Inverse of even_grid: (rank, n) fp32."""
    step, least = grid.float().repeat_interleave(group, dim=2)[:, :, : codes.size(1)]
    return codes.float() * step + least


def add_low_rank(cfg: Settings, state: dict[str, Tensor], stored: dict[str, Stored]) -> None:
    """LQER (PR 1797): store the first LQER_RANK singular parts of W - Q of the LQER_TOP_K matrices with the largest
    error, as `<group>.<number of the matrix>`.
    """
    errors, group_size = [], cfg.lqer_asym_group
    for group in quant_groups(cfg):
        if "codes" in stored[group.name].parts:
            error = group.view(state[group.param]).float() - rebuild(stored[group.name])
            errors += [(float(e.norm()), f"{group.name}.{i}", e) for i, e in enumerate(error)]
    for _, name, error in sorted(errors, key=lambda e: -e[0])[: cfg.lqer_top_k]:
        left, size, right = torch.linalg.svd(error, full_matrices=False)
        root, parts = size[: cfg.lqer_rank].sqrt()[:, None], {}
        for side, factor in (("left", left.T), ("right", right)):
            parts[side], parts[f"{side}_grid"] = even_grid(factor[: cfg.lqer_rank] * root, cfg.lqer_factor_bits,
                                                           group_size)
        stored[name] = Stored("low rank", [len(root), *error.shape, group_size], parts)


def quantize_group(rt: Runtime, group: QuantGroup, weight: Tensor, factors: dict[str, Factors],
                   steps: tuple[Tensor, Tensor] | None, chained: bool) -> Stored:
    """Matrices (n, rows, cols) by GPTQ, each on one rank, with SDClip's steps or with `steps` by row and column; or by
    a trellis on half of those, which takes as many bits.
    """
    share = slice(rt.rank, None, rt.world)
    if steps:
        row, col = steps[0] - 4 * chained, steps[1]
        form, bits = f"{'trellis' if chained else 'weighted'} {group.kind}", 16
        scales, parts = octaves(row)[..., None] * octaves(col)[:, None], {"row": row, "col": col}
    else:
        scales, bits = clip_scales(weight, group.bits, group.sigmas), group.bits
        form, parts = f"scaled {group.kind}", {"scales": scales}
    order, upper = factors[group.hessian] if group.hessian else factorize(
        torch.eye(weight.size(2), device=weight.device)[None])
    codes, weight = torch.zeros_like(weight, dtype=torch.int32), weight.float()  # NCCL has no int16
    if steps and group.kind == "table":
        left, right = (rt.share_(part.int(), "common part") for part in common_part(weight[0] / scales[0]))
        parts |= {"left": left.to(torch.int8), "right": right.to(torch.int16)}
        weight = weight - scales * (left.T.float() @ right.float() / COMMON_UNIT)
    if chained and len(codes[share]):
        codes[share] = trellis(weight[share] / octaves(row[share])[..., None], upper[share], octaves(col[share]))
    elif len(codes[share]):
        codes[share] = gptq(weight[share], (order[share], upper[share]), scales[share], bits)
    parts["codes"] = rt.sum_(codes, "codes").to(torch.int16 if steps else torch.int8)
    return Stored(form, list(codes.shape), parts)


@torch.no_grad()
def quantize(cfg: Settings, rt: Runtime, state: dict[str, Tensor], factors: dict[str, Factors],
             steps: dict[str, tuple[Tensor, Tensor]] | None = None, chained: bool = False) -> dict[str, Stored]:
    """Everything the artifact stores, by group or by parameter, on the CPU of every rank, each having done its share.

    A group whose matrices have fewer than QUANT_MIN_WEIGHTS weights, and what is in no group, is stored in fp16.
    """
    stored, groups = {}, quant_groups(cfg)
    for group in rt.progress(groups, "GPTQ"):
        weight = group.view(state[group.param])
        if group.kind == "gate":
            most = 2 ** (group.bits - 1) - 1
            step = (weight.abs().amax(-1) / most).clamp(min=2.0**-14).half()
            levels = (weight / step.float()[..., None]).round().clamp(-most, most).to(torch.int8)
            stored[group.name] = Stored("gate", list(weight.shape), {"levels": levels, "scales": step})
        elif weight[0].numel() < cfg.quant_min_weights:
            stored[group.name] = stored_half(weight)
        else:
            stored[group.name] = quantize_group(rt, group, weight, factors, steps and steps[group.name], chained)
    covered = {group.param for group in groups}
    stored |= {name: stored_half(tensor) for name, tensor in state.items() if name not in covered}
    if cfg.lqer_enabled:
        add_low_rank(cfg, state, stored)
    return {name: Stored(form, sizes, {part: parts[part].cpu() for part in form_parts(form, sizes)})
            for name, (form, sizes, parts) in stored.items()}


def rebuild(item: Stored) -> Tensor:
    """The fp32 tensor that `item` stands for."""
    form, sizes, parts = item
    if form == "half":
        return parts["values"].float()
    if form == "low rank":
        left, right = (from_even_grid(parts[side], parts[f"{side}_grid"], sizes[3]) for side in ("left", "right"))
        return (left.double().T @ right.double()).float()  # the same on any machine
    if "scales" in parts:
        scales = parts["scales"].float()[..., None]
    else:
        scales = octaves(parts["row"])[..., None] * octaves(parts["col"])[:, None]
    weight = parts["levels" if form == "gate" else "codes"].float() * scales
    if "left" in parts:
        weight = weight + scales * (parts["left"].float().T @ parts["right"].float() / COMMON_UNIT)
    return weight


def dequantize(cfg: Settings, stored: dict[str, Stored]) -> dict[str, Tensor]:
    """The model's parameters, fp32, from what `quantize` stored. KeyError or ValueError when it does not fit."""
    tensors, state = {name: rebuild(item) for name, item in stored.items()}, {}
    for name in [name for name, item in stored.items() if item.form == "low rank"]:
        group, _, number = name.rpartition(".")
        tensors[group][int(number)] += tensors.pop(name)
    for group in quant_groups(cfg):
        weight = tensors.pop(group.name)
        if len(weight) != max(group.count, 1):
            raise ValueError(f"{group.name}: {len(weight)} matrices instead of {max(group.count, 1)}")
        weight = weight if group.count else weight[0]
        state[group.param] = torch.cat((state[group.param], weight)) if group.first else weight
    return state | tensors


# ----------------------------------------------------------------------------------------------------------------------
# Entropy coding
#
# In: integer tensors and the sizes that their steps let expect. Out: bytes, and the same integers again: exactly, on
# any machine.


LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def compress(data: bytes, compressor: str) -> bytes:
    """A general compressor's form of any bytes. With COMPRESSOR=ans it is LZMA, for all but the codes."""
    if compressor == "brotli":
        return import_packer("brotli").compress(data, quality=11, lgwin=24)
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def decompress(data: bytes, compressor: str, most: int) -> bytes:
    """The content of a stream; ValueError where it is cut off, or far more than `most` bytes: it could be gigabytes."""
    if compressor == "brotli":
        unpacker = import_packer("brotli").Decompressor()
        found, whole = unpacker.process(data, output_buffer_limit=most), unpacker.is_finished()
    else:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
        found, whole = unpacker.decompress(data, most), unpacker.eof
    if not whole:
        raise ValueError("a stream is cut off, or larger than it should be")
    return found


def import_packer(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        which, other = {"brotli": ("brotli", "lzma"), "constriction": ("ans", "brotli")}[name]
        raise RunError(f"COMPRESSOR={which}: the package {name} is not installed; pip install {name}, or take "
                       f"COMPRESSOR={other}") from None


def table_model(entries: np.ndarray):
    """Distribution over len(entries) symbols with odds 2^(-entry/8), 0 for 255, from uint8 entries. The same on every
    machine: made of square roots, products, quotients and an exact sum, which IEEE 754 rounds alike.
    """
    eighth = math.sqrt(math.sqrt(math.sqrt(0.5)))
    odds = np.append(np.cumprod([1.0] + 254 * [eighth]), 0.0)[entries]
    return import_packer("constriction").stream.model.Categorical(odds / math.fsum(odds), perfect=False)


# Lowest bits of codes that take no table: evenly spread, seen from a context of expected size 2^4 and above
PLAIN_BITS = tuple(max(0, context // 8 - 12) for context in range(192))
Turn = tuple[np.ndarray, np.ndarray]  # symbols int16 and contexts uint8, that are read together
EMPTY_TURN = (np.zeros(0, dtype=np.int16), np.zeros(0, dtype=np.uint8))


def by_context(symbols: np.ndarray, contexts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The contexts that occur, ascending, each with its symbols, int32, in their order."""
    counts = np.bincount(contexts)
    parts = np.split(symbols[np.argsort(contexts, kind="stable")].astype(np.int32), np.cumsum(counts)[:-1])
    return [(context, part) for context, part in enumerate(parts) if len(part)]


def encode_integers(turns: Sequence[Turn], plain: tuple[int, ...] = (0,) * 256) -> tuple[bytes, bytes]:
    """Tables, by LZMA, and words of asymmetric numeral systems (arXiv 1311.2540) for symbols in contexts, turn by turn.

    Each context has the table of its own frequencies over all turns; its lowest plain[context] bits take none.
    """
    constriction = import_packer("constriction")
    coder, tables, models = constriction.stream.stack.AnsCoder(), [], {}
    for context, part in by_context(*(np.concatenate(arrays) for arrays in zip(*turns))):
        part = part >> plain[context]
        least = int(part.min())
        counts = np.bincount(part - least, minlength=2)
        with np.errstate(divide="ignore"):
            entries = (8 * np.log2(counts.max() / counts)).round().clip(0, 254)
        entries = np.where(counts > 0, entries, 255).astype(np.uint8)
        tables += [bytes(8)] * (context - len(tables))  # of contexts that do not occur
        tables.append(np.array([least, len(entries)], dtype="<i4").tobytes() + entries.tobytes())
        models[context] = least, table_model(entries)
    for turn in reversed(turns):  # what is encoded last is decoded first
        for context, part in reversed(by_context(*turn)):
            bits, (least, model) = plain[context], models[context]
            if bits:
                coder.encode_reverse(part & (1 << bits) - 1, constriction.stream.model.Uniform(1 << bits))
            coder.encode_reverse((part >> bits) - least, model)
    return compress(b"".join(tables), "lzma"), coder.get_compressed().tobytes()


class IntegerReader:
    """Inverse of encode_integers."""

    def __init__(self, tables: bytes, words: bytes, plain: tuple[int, ...] = (0,) * 256):
        self.uniform = import_packer("constriction").stream.model.Uniform
        self.coder = import_packer("constriction").stream.stack.AnsCoder(np.frombuffer(words, dtype=np.uint32))
        self.models, self.used, self.plain, place, tables = [], set(), plain, 0, decompress(tables, "lzma", MOST_TEXT)
        while place < len(tables):
            least, size = struct.unpack_from("<iI", tables, place)
            entries = np.frombuffer(tables, dtype=np.uint8, count=size, offset=place + 8)
            self.models.append((least, table_model(entries)) if size else None)
            place += 8 + size

    def read(self, contexts: np.ndarray) -> np.ndarray:
        """The next turn's symbols (n,) int16."""
        symbols, parts = np.empty(len(contexts), dtype=np.int16), [np.zeros(0, dtype=np.int16)]
        for context, count in enumerate(np.bincount(contexts).tolist()):
            if count:
                self.used.add(context)
                bits, (least, model) = self.plain[context], self.models[context]
                part = self.coder.decode(model, count) + least
                if bits:
                    part = (part << bits) + self.coder.decode(self.uniform(1 << bits), count)
                parts.append(part.astype(np.int16))
        symbols[np.argsort(contexts, kind="stable")] = np.concatenate(parts)
        return symbols

    def close(self) -> None:
        """ValueError when words or tables are left over."""
        unread = {i for i, model in enumerate(self.models) if model} - self.used
        if unread or self.models[-1:] == [None] or not self.coder.is_empty():
            raise ValueError("more is coded than its header says")


def walk_trellis(sizes: np.ndarray, visit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Codes (n, rows, cols) int16 that trellis() has rounded, column by column: half of each, rounded down, from
    `visit`, and its parity from those before it in its row.

    sizes (n, rows, cols): contexts, even ones, by size alone. visit takes those of a column, of odd codes one more.
    """
    after, state = np.array(STATE_AFTER, dtype=np.uint8), np.zeros(sizes[..., 0].size, dtype=np.uint8)
    codes = np.empty((sizes.shape[2], len(state)), dtype=np.int16)
    for column, size in enumerate(sizes.reshape(-1, sizes.shape[2]).T):
        halves = visit(size + state % 2)
        codes[column], state = 2 * halves + state % 2, after[state, halves & 1]
    return np.ascontiguousarray(codes.T).reshape(sizes.shape)


def step_exponents(item: Stored) -> list[np.ndarray]:
    """Exponents (n, rows) and (n, cols) int16 of the steps of codes; 0 where they have none."""
    n, rows, cols = item.sizes
    return [item.parts[part].numpy().astype(np.int16) if part in item.parts else np.zeros((n, size), dtype=np.int16)
            for part, size in (("row", rows), ("col", cols))]


def size_contexts(row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """(n, rows, cols) uint8 contexts, even ones, of codes of expected size 2^((row + col)/4): quarters of an octave."""
    return 2 * (row[:, :, None] + col[:, None] + 32).clip(0, 95).astype(np.uint8)


def whole_part(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(1, rows, cols) int16: the product of common_part's factors, int16, rounded, in integers alone."""
    return ((left.T.astype(np.int32) @ right.astype(np.int32) + COMMON_UNIT // 2) // COMMON_UNIT).astype(np.int16)[None]


def side_parts(item: Stored) -> dict[str, tuple[list[int], torch.dtype]]:
    """The integer parts of a form but its codes, each with its shape and dtype, in order."""
    return {part: (shape, dtype) for part, (shape, dtype) in form_parts(item.form, item.sizes).items()
            if part != "codes" and not dtype.is_floating_point}


def pack_integers(stored: dict[str, Stored]) -> list[bytes]:
    """Four streams for integers. Codes (n, rows, cols) are coded under tables for their expected size by row and
    column; those of a trellis column by column, also by parity. Before them come all other integers and what gives that
    size: the spread of the weights of each row and column, in quarters of an octave, which with the step makes that of
    the codes. What the rows of a table have in common is coded apart, if quantize() has not stored it so.
    """
    side, turns = [np.zeros(0, dtype=np.int16)], [EMPTY_TURN]
    for item in stored.values():
        side += [item.parts[part].numpy().astype(np.int16) for part in side_parts(item)]
        if "codes" not in item.parts:
            continue
        array = item.parts["codes"].numpy().astype(np.int16)
        if item.form in COMMON_APART:
            side += [factor.numpy().astype(np.int16) for factor in common_part(item.parts["codes"][0])]
            array = array - whole_part(*side[-2:])
        square = array.astype(np.float32) ** 2
        row = (2 * np.log2(square.mean(2) + 0.02)).round()
        col = (2 * np.log2((square / 2 ** (row / 2)[:, :, None]).mean(1) + 1e-3)).round()
        row, col = row.astype(np.int16), col.astype(np.int16)
        side += [size + step for size, step in zip((row, col), step_exponents(item))]
        sizes = size_contexts(row - 4 * item.chained, col)
        turns += path_turns(array, sizes) if item.chained else [(array.ravel(), sizes.ravel())]
    side_turns = [(a.ravel(), np.full(a.size, i % 256, dtype=np.uint8)) for i, a in enumerate(side)]
    return [*encode_integers(side_turns), *encode_integers(turns, PLAIN_BITS)]


def path_turns(codes: np.ndarray, sizes: np.ndarray) -> list[Turn]:
    """The turns in which walk_trellis() reads these codes. ValueError where no path through the trellis has them."""
    columns, turns = iter(codes.reshape(-1, codes.shape[2]).T), []

    def visit(contexts: np.ndarray) -> np.ndarray:
        turns.append((next(columns) >> 1, contexts))
        return turns[-1][0]

    if (walk_trellis(sizes, visit) != codes).any():
        raise ValueError("codes that no path through the trellis has")
    return turns


def unpack_integers(stored: dict[str, Stored], streams: list[bytes]) -> None:
    """Inverse of pack_integers: gives their integer parts to things of these forms and sizes, in order."""
    reader, codes, numbers = IntegerReader(*streams[:2]), IntegerReader(*streams[2:], PLAIN_BITS), itertools.count(1)

    def read(*shape: int) -> np.ndarray:
        return reader.read(np.full(math.prod(shape), next(numbers) % 256, dtype=np.uint8)).reshape(shape)

    for item in stored.values():
        item.parts.update({part: torch.from_numpy(read(*shape)).to(dtype)
                           for part, (shape, dtype) in side_parts(item).items()})
        entries = form_parts(item.form, item.sizes)
        if "codes" not in entries:
            continue
        apart = item.form in COMMON_APART
        common = whole_part(*(read(COMMON_RANK, size) for size in item.sizes[1:])) if apart else np.int16(0)
        row, col = (read(*step.shape) - step for step in step_exponents(item))
        sizes = size_contexts(row - 4 * item.chained, col)
        array = walk_trellis(sizes, codes.read) if item.chained else codes.read(sizes.ravel()).reshape(sizes.shape)
        item.parts["codes"] = torch.from_numpy(array + common).to(entries["codes"][1])
    reader.close()
    codes.close()


def to_stream(tensor: Tensor) -> bytes:
    """Codes column by column, so that neighbours share an input; of two bytes all low ones, then all high ones."""
    if not tensor.is_floating_point():
        tensor = tensor.mT
    return tensor.contiguous().numpy().view(np.uint8).reshape(-1, tensor.element_size()).T.tobytes()


def from_stream(data: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Inverse of to_stream. ValueError when the length does not fit the shape."""
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, len(data) // dtype.itemsize)
    array = planes.T.copy().view(str(dtype).removeprefix("torch."))
    if dtype.is_floating_point:
        return torch.from_numpy(array.reshape(shape))
    return torch.from_numpy(array.reshape(*shape[:-2], shape[-1], shape[-2])).mT.contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Artifact
#
# In: quantized tensors, settings, the source of this script. Out: the two files that are counted, a container of plain
# data and a ZIP application, and weights from the container again; loading one runs nothing of it.


ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGLF", 5
MOST_CODES = 1 << 28  # of an artifact: a header that asks for more is damaged, and could ask for all memory
MOST_TEXT = 1 << 24  # bytes of a header, and of the coder's tables
MOST_COLS = 1 << 16  # of a matrix: codes along a trellis are read column by column
COMPRESSORS = ("brotli", "lzma", "ans")


def write_artifact(settings: dict[str, Any], stored: dict[str, Stored], compressor: str) -> bytes:
    """The container: magic, version, compressor, checksum, then header and streams compressed one by one.

    The header is JSON: settings, name, form and sizes of what is stored, the streams' lengths. All fp16 parts share the
    first stream; integer parts have one each, or by `ans` four together. No pickle.
    """
    parts = [parts[part] for form, sizes, parts in stored.values() for part in form_parts(form, sizes)]
    halves = [torch.zeros(0, dtype=torch.float16), *(t.flatten() for t in parts if t.dtype == torch.float16)]
    raw = [to_stream(torch.cat(halves))]
    raw += [] if compressor == "ans" else [to_stream(t) for t in parts if t.dtype != torch.float16]
    with ThreadPoolExecutor() as pool:  # the compressors release the interpreter lock
        packed = list(pool.map(lambda data: compress(data, compressor), raw))
    if compressor == "ans":
        packed += pack_integers(stored)
    header = {"settings": settings, "stored": [[name, form, sizes] for name, (form, sizes, _) in stored.items()],
              "bytes": [len(p) for p in packed]}
    head = compress(json.dumps(header, separators=(",", ":")).encode(), compressor)
    body = bytes([ARTIFACT_VERSION, COMPRESSORS.index(compressor)]) + len(head).to_bytes(4, "little") + head
    body += b"".join(packed)
    return ARTIFACT_MAGIC + hashlib.blake2b(body, digest_size=16).digest() + body


def open_artifact(data: bytes, name: str) -> tuple[dict[str, Any], str, list, list[bytes]]:
    """An artifact's settings, its compressor, name, form and sizes of what is stored, and the streams that all of it is
    still packed in. RunError, naming the file `name`, on anything that is not a whole one.
    """
    if data[:4] != ARTIFACT_MAGIC:
        raise RunError(f"{name}: not an artifact of this script (no {ARTIFACT_MAGIC.decode()} at its start)")
    body = data[20:]
    if hashlib.blake2b(body, digest_size=16).digest() != data[4:20]:
        raise RunError(f"{name}: checksum does not match its {len(data)} bytes: truncated or corrupted")
    if len(body) < 6 or body[0] != ARTIFACT_VERSION or body[1] >= len(COMPRESSORS):
        raise RunError(f"{name}: another version of artifact (this script reads {ARTIFACT_VERSION})")
    compressor, size = COMPRESSORS[body[1]], int.from_bytes(body[2:6], "little")
    with refuse(f"{name}: checksum holds, content is not an artifact"):
        header = json.loads(decompress(body[6 : 6 + size], compressor, MOST_TEXT))
        ends = np.cumsum([6 + size] + header["bytes"])
        return dict(header["settings"]), compressor, header["stored"], [body[a:b] for a, b in itertools.pairwise(ends)]


def read_artifact(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Settings and content of an artifact. RunError, naming the file `name`, on anything that is not a whole one."""
    settings, compressor, contents, streams = open_artifact(data, name)
    with refuse(f"{name}: checksum holds, content is not an artifact"):
        stored = {n: Stored(form, sizes, {}) for n, form, sizes in contents}
        shapes = [(item.parts, part, *entry) for item in stored.values()
                  for part, entry in form_parts(item.form, item.sizes).items()]
        products = sum(math.prod(item.sizes[1:3]) for item in stored.values() if item.form == "low rank")
        columns = max((item.sizes[2] for item in stored.values() if item.chained), default=0)
        least = min((size for item in stored.values() for size in item.sizes), default=0)
        if products + sum(math.prod(shape) for *_, shape, _ in shapes) > MOST_CODES or columns > MOST_COLS or least < 0:
            raise ValueError("sizes of no model")
        halves = [entry for entry in shapes if entry[-1] == torch.float16]
        codes = [entry for entry in shapes if entry[-1] != torch.float16 and compressor != "ans"]
        sizes = [2 * sum(math.prod(shape) for *_, shape, _ in halves),
                 *(math.prod(shape) * dtype.itemsize for *_, shape, dtype in codes)]
        packed = list(zip(streams[:1] if compressor == "ans" else streams, sizes, strict=True))
        with ThreadPoolExecutor() as pool:
            half, *raw = pool.map(lambda entry: decompress(entry[0], compressor, entry[1]), packed)
        values = from_stream(half, torch.float16, [-1]).split([math.prod(shape) for *_, shape, _ in halves])
        for (parts, part, shape, _), value in zip(halves, values, strict=True):
            parts[part] = value.view(shape)
        if compressor == "ans":
            unpack_integers(stored, streams[1:])
        for (parts, part, shape, dtype), stream in zip(codes, raw):
            parts[part] = from_stream(stream, dtype, shape)
        return settings, stored


def artifact_settings(cfg: Settings) -> dict[str, Any]:
    """What stands in the artifact: the settings its weights and its score depend on."""
    names = ["vocab_size", "caseops_enabled", "bos_id", "train_seq_len"]
    return {name: getattr(cfg, name) for name in [*names, *Settings.group("model", "eval")]
            if name not in ("eval_batch_tokens", "eval_budget_seconds")}


def load_weights(model: GPT, cfg: Settings, stored: dict[str, Stored], name: str) -> None:
    """Put an artifact's weights into the model. RunError unless they fit, parameter by parameter."""
    with refuse(f"{name}: tensors do not fit the model of its settings"):
        model.load_state_dict(dequantize(cfg, stored))


FINEST_BITS = 6.0  # of a weight: more buy nothing that can be measured


@torch.no_grad()
def fill_budget(cfg: Settings, rt: Runtime, state: dict[str, Tensor], stats: Statistics, room: int) -> bytes:
    """The artifact with the finest weighted steps that take at most `room` bytes, on every rank; by secants of exact
    sizes until it takes 99.8 % of them. If none fits, the smallest one tried.

    With QUANT_TRELLIS its codes are a trellis's, if `ans` packs them. Those take as many bytes as plain codes of double
    steps, to one percent, and longer to find, so the search begins with plain ones.
    """
    factors, settings = factorize_all(stats.hessians, sort=False), artifact_settings(cfg)
    curved = curvatures(cfg, state, stats, factors)
    for t in (t for curvature in curved.values() for t in curvature):
        rt.share_(t, "curvatures")  # rank 0's: a last bit could differ, and turn a step
    views = {group.name: group.view(state[group.param]).float() for group in quant_groups(cfg)}
    count, octaves_wide = 0, 0.0
    for name, c in curved.items():
        wide = views[name].std(2).clamp(min=1e-9).log2() + c.row + c.col.float().mean(1, keepdim=True) / 4
        wide = wide[c.row > -49]  # rows whose outputs have no gradient take no bits
        count, octaves_wide = count + wide.numel() * c.col.size(1), octaves_wide + float(wide.sum()) * c.col.size(1)
    # entropy of a Gaussian weight over steps from c = 2^0 on, √(2πe) = 4.133; the same float on every rank
    bits = rt.largest(octaves_wide / max(count, 1) + math.log2(4.133))
    finest, tried, best, chained = bits - FINEST_BITS, [], b"", False
    wanted = cfg.quant_trellis and cfg.compressor == "ans" and count > 0
    at = max(finest, bits - 8 * room / max(count, 1))
    for turns_left in reversed(range(12)):
        steps = {name: weighted_steps(curvature, at) for name, curvature in curved.items()}
        stored = quantize(cfg, rt, state, factors, steps, chained)
        artifact = rt.share_bytes(write_artifact(settings, stored, cfg.compressor) if rt.rank == 0 else None)
        size = len(artifact)
        rt.log(f"steps from 2^{at:.3f}{', trellis' if chained else ''}: {size} bytes of {room}")
        if not best or (size <= room and (size > len(best) or len(best) > room)) or size < len(best) > room:
            best = artifact
        stuck = any(at > t + 0.5 and size > max(room, 0.99 * other) for t, other in tried)  # coarser saves nothing
        hopeless = stuck and at > bits + 2  # all codes are 0
        done = not count or hopeless or (size <= room and (size >= 0.998 * room or at <= finest))
        switch = wanted and not chained and turns_left and (done or abs(size - room) < 0.1 * room)
        if done and not switch:
            break
        slope = -count / 8  # bytes an octave
        if tried:
            slope = min(max((size - tried[-1][1]) / (at - tried[-1][0]), 2 * slope), 0.2 * slope)
        tried.append((at, size))
        if switch:
            tried, best, chained = [], b"", True
        at = bits + 3 if stuck else max(at + (0.9992 * room - size) / slope, finest)
        above = max((t for t, other in tried if other > room), default=finest)
        below = min((t for t, other in tried if other <= room), default=math.inf)
        if below < math.inf and not above < at < below:
            at = (above + below) / 2
    if chained and len(best) > room:  # it has a table more for each context, which plain codes may do without
        best = min(best, fill_budget(dataclasses.replace(cfg, quant_trellis=False), rt, state, stats, room), key=len)
    return best


def prune(settings: dict[str, Any], stored: dict[str, Stored], compressor: str, room: int) -> bytes:
    """The artifact; where it takes more than `room` bytes, with the codes of ±1 that have the least steps set to 0, as
    few as bring it to 99.9 % of that (PR 609). If even all do not, without any.
    """
    best = write_artifact(settings, stored, compressor)
    if len(best) <= room:
        return best
    scaled = {n: item for n, item in stored.items() if item.form.startswith("scaled")}
    steps = torch.cat([torch.zeros(0), *(item.parts["scales"].float().flatten() for item in scaled.values())]).unique()
    low, high = 0, len(steps)
    while low < high and not 0.999 * room <= len(best) <= room:
        middle, pruned = (low + high) // 2, {}
        for n, item in scaled.items():
            codes, small = item.parts["codes"], (item.parts["scales"].float() <= steps[middle])[..., None]
            pruned[n] = item._replace(parts=item.parts | {"codes": codes.masked_fill((codes.abs() == 1) & small, 0)})
        tried = write_artifact(settings, stored | pruned, compressor)
        if len(tried) <= room:
            best, high = tried, middle
        else:
            low = middle + 1
    return best


def read_code() -> bytes:
    """The file that this script runs from: its source, or the ZIP application that holds it."""
    archive = getattr(globals().get("__loader__"), "archive", None)
    with open(archive or __file__, "rb") as file:
        return file.read()


def pack_code(code: bytes) -> bytes:
    """The counted script: a ZIP application that holds the source byte for byte and one line that starts it. One that
    is already packed is given back as it is.

    Python runs a ZIP file whatever its name, imports from it, and finds the source in it for tracebacks and Triton.
    Times are fixed, so that equal sources give equal bytes.
    """
    if zipfile.is_zipfile(io.BytesIO(code)):
        return code
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in (("train_gpt.py", code), ("__main__.py", PACKED_MAIN)):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # as on Unix, wherever it is packed
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)  # an entry takes no level from its archive
    return packed.getvalue()


PACKED_MAIN = b"import sys, train_gpt; sys.exit(train_gpt.main())\n"


# ----------------------------------------------------------------------------------------------------------------------
# Scoring
#
# In: losses of the targets of a text, and the bytes that these stand for. Out: the score in bits per byte, each target
# counted once; the n-gram tilt, which makes a token likelier that followed the same tokens before.


HINT_KINDS = 10  # hints of a probability from 1 to 1/2, to 1/4, ..., and of 2^-9 or less
HINT_PARTS = 32  # of a text, searched on a CPU's threads: less memory at a time, and more of it in caches


def find_hints(tokens: Tensor, orders: Sequence[int], threshold: float) -> Tensor:
    """Hints (N,) int64 for the tokens (N,) of a stream: the token that most often followed the n - 1 tokens before this
    one, earlier in the stream, for the longest n of `orders` that has one; IGNORE where none has (PR 1514).

    A hint follows from tokens before its position alone. Contexts are compared by a hash of 64 bits. The text is
    searched in parts by its shortest contexts, and a context of more tokens only where the one of fewer came twice.
    """
    tokens, shortest = tokens.long(), min(orders)
    hints = torch.full_like(tokens, IGNORE)
    places = torch.arange(len(tokens), device=tokens.device)[shortest - 1 :]
    hashes = hash_before(tokens, places, 1, shortest)
    parts = ((hashes >> 40) % HINT_PARTS).to(torch.uint8)

    def search(part: int) -> None:
        found = (parts == part).nonzero().flatten()
        place, context, known = places[found], hashes[found], shortest
        for order in sorted(orders):
            whole = (place >= order - 1).nonzero().flatten()
            place = place[whole]  # ascending, so that memory is read in its order
            context, known = context[whole] ^ hash_before(tokens, place, known, order), order
            in_order, which = context.sort(stable=True)
            twice = in_order[1:] == in_order[:-1]
            repeated = (F.pad(twice, (1, 0)) | F.pad(twice, (0, 1))).nonzero().flatten()
            if not len(repeated):
                return
            which = which[repeated]
            leaders = find_leaders(in_order[repeated], tokens[place][which], threshold)
            sure = (leaders != IGNORE).nonzero().flatten()
            hints[place[which[sure]]] = leaders[sure]
            left = torch.zeros_like(place, dtype=torch.bool).index_fill(0, which, True).nonzero().flatten()
            place, context = place[left], context[left]

    on_threads(search, range(HINT_PARTS), tokens.device)
    return hints


def hash_before(tokens: Tensor, place: Tensor, first: int, stop: int) -> Tensor:
    """What the tokens at distances first to stop - 1 before each place (n,) add to its context's hash, (n,) int64."""
    found = torch.zeros_like(place)
    for j in range(first, stop):
        odd = pow(0x9E3779B97F4A7C15, 2 * j + 1, 2**64)
        found ^= tokens[place - j] * (odd - 2**64 if odd >= 2**63 else odd)
    return found


def find_leaders(context: Tensor, follows: Tensor, threshold: float) -> Tensor:
    """The token that most often followed the same context before, (n,) int64; of several as often, the one that was so
    first. IGNORE where there was none, or in less than `threshold` of the times. context, follows (n,) int64: equal
    contexts stand together, in the order of the stream.
    """
    n, at = len(context), torch.arange(len(context), device=context.device)
    first = F.pad(context[1:] != context[:-1], (1, 0), value=True)
    group, visits = first.cumsum(0), at - torch.where(first, at, 0).cummax(0).values + 1
    pair, order_of_pairs = (group * 65536 + follows).sort(stable=True)
    new_pair = F.pad(pair[1:] != pair[:-1], (1, 0), value=True)
    count = torch.empty_like(at)  # how often this token has followed this context, this time included
    count[order_of_pairs] = at - torch.where(new_pair, at, 0).cummax(0).values + 1
    most = (group * (n + 1) + count).cummax(0).values
    leads = F.pad(most[1:] != most[:-1], (1, 0), value=True)  # from here on this token is the most frequent
    leader = follows[torch.where(leads, at, 0).cummax(0).values]
    sure = (most - group * (n + 1)) / visits.double() >= threshold
    known = torch.where(sure[:-1] & ~first[1:], leader[:-1], IGNORE)  # before this visit
    return F.pad(known, (1, 0), value=IGNORE)


class Tilt(NamedTuple):
    """The n-gram tilt of a text: where hints are, which of them are right, and by how much they are raised."""

    places: Tensor  # (h,) int64, ascending: targets that have a hint
    right: Tensor  # (h,) bool: the hint is the target
    boosts: list[float]  # of the hint's logit

    @classmethod
    def of(cls, cfg: Settings, val: Validation) -> "Tilt | None":
        if val.hints is None:
            return None
        places = (val.hints != IGNORE).nonzero().flatten()
        steps = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0) if cfg.hedge_enabled else (1.0,)
        return cls(places, (val.hints == val.tokens)[places], [cfg.token_boost * step for step in steps])

    def apply(self, losses: Tensor, hint_losses: Tensor) -> Tensor:
        """Losses (N,) float64 of all targets, in nats, given those of the targets and of their hints without a tilt.

        By a boost b, p'(x) = p(x) e^(b [x is the hint]) / (1 + p(hint) (e^b - 1)), which adds up to 1 whatever p is
        (PR 1514). Several boosts are mixed, in the order of the stream, by weights in proportion to exp(-what each has
        cost so far) (Hedge, PR 2050). Hints that the model finds about as likely, to a factor of two, have weights of
        their own: what is rare to the model and yet known from before is raised by more (docs/log.md).
        """
        losses, hint_losses = losses.double(), hint_losses.double()[self.places]
        b = torch.tensor(self.boosts, dtype=torch.float64, device=losses.device)[:, None]
        kinds = (hint_losses / math.log(2)).long().clamp(0, HINT_KINDS - 1)
        for kind in kinds.unique():
            mine = (kinds == kind).nonzero().flatten()
            raised = torch.log1p(torch.exp(-hint_losses[mine]) * torch.expm1(b))
            each = losses[self.places[mine]] - b * self.right[mine] + raised
            so_far = F.pad(each.cumsum(1), (1, 0))  # (boosts, hints of this kind + 1)
            losses[self.places[mine]] = -torch.logsumexp(-so_far, 0).diff()
        return losses


class Score(NamedTuple):
    """One evaluation of the whole validation text."""

    val_loss: float  # nats a token
    val_bpb: float  # bits a byte
    tokens: int
    bytes: int
    seconds: float


class Scorer:
    """Turns losses into nats, bytes and the score; each target of the stream must be given exactly once.

    Targets are tokens 1..N-1 of the stream, boundary tokens included; index 0 takes what padding produces. Losses are
    kept by position and added in float64 in stream order, so the score does not depend on batches or ranks.
    """

    def __init__(self, rt: Runtime, target_bytes: Tensor, loaded: float | None = None, tilt: Tilt | None = None):
        """target_bytes (N,) int32: bytes charged to each token. `loaded`: when the artifact was loaded, from where
        EVAL_BUDGET_SECONDS counts; None: now.
        """
        self.rt, self.target_bytes, self.tilt, self.began = rt, target_bytes, tilt, time.perf_counter()
        self.loaded = self.began if loaded is None else loaded
        self.losses = torch.zeros(len(target_bytes), dtype=torch.float32, device=rt.device)
        self.hint_losses = torch.zeros_like(self.losses) if tilt else None
        self.times = torch.zeros(len(target_bytes), dtype=torch.int32, device=rt.device)

    def add(self, positions: Tensor, losses: Tensor, hint_losses: Tensor | None = None) -> None:
        """Losses in nats of the targets at these positions of the stream, and with a tilt those of their hints, all of
        one shape; 0 for padding.
        """
        positions = positions.flatten()
        self.losses.index_add_(0, positions, losses.flatten().float())
        if hint_losses is not None:
            self.hint_losses.index_add_(0, positions, hint_losses.flatten().float())
        self.times.index_add_(0, positions, torch.ones_like(positions, dtype=torch.int32))

    def running(self) -> str:
        """The score of what this rank has charged so far, in words."""
        n_bytes = int((self.target_bytes.to(self.times.device) * (self.times > 0))[1:].sum(dtype=torch.int64))
        return f"bpb {float(self.losses[1:].sum(dtype=torch.float64)) / math.log(2) / max(n_bytes, 1):.4f}"

    def charged(self) -> Tensor:
        """Losses (N,) of all targets over all ranks, with the tilt if there is one."""
        losses = self.rt.sum_(self.losses.clone())
        return self.tilt.apply(losses, self.rt.sum_(self.hint_losses.clone())) if self.tilt else losses

    def finish(self) -> Score:
        """The score over all ranks. RunError when a target was scored twice or never."""
        times = self.rt.sum_(self.times.clone())[1:].cpu()
        wrong = (times != 1).nonzero().flatten()
        if len(wrong):
            raise RunError(f"score refused: {int((times == 0).sum())} targets never scored, {int((times > 1).sum())} "
                           f"more than once (first: token {int(wrong[0]) + 1})")
        losses = self.charged()[1:].cpu()
        nats, n_bytes = float(losses.double().sum()), int(self.target_bytes[1:].sum(dtype=torch.int64))
        if not math.isfinite(nats):
            raise RunError("score refused: a loss is not finite")
        if not n_bytes:
            raise RunError("score refused: the validation tokens stand for no text")
        return Score(nats / len(losses), nats / (math.log(2) * n_bytes), len(losses), n_bytes,
                     time.perf_counter() - self.began)


# ----------------------------------------------------------------------------------------------------------------------
# Adaptation
#
# In: tokens that have been scored. Out: weights, or adapters of single documents, that have learned from them (which is
# test-time training); in which batches and passes that goes, and for how long there is time.


def gather(tokens: Tensor, place: Tensor, scored: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64, at `place` (rows, length) of a stream (N,); IGNORE where not `scored`.

    Where the stream has no target any more, inputs are padding that starts no document: every start has a place in
    Bounds, whose size a compiled graph is made for.
    """
    last = len(tokens) - 1
    targets = torch.where(scored, tokens[(place + 1).clamp(max=last)].long(), IGNORE)
    return torch.where(place >= last, filler(bos), tokens[place.clamp(max=last)].long()), targets


class Sgd:
    """Momentum SGD on all weights, from tokens that have been scored; the same on every rank."""

    def __init__(self, cfg: Settings, rt: Runtime, model: GPT, forward: Callable):
        """The weights require gradients only in a step. How many rows a forward pass has follows from the usual step
        alone: one size, one graph.

        Phased: one row holds a whole step, with attention inside its documents (PR 1626); a rank computes it.
        """
        self.cfg, self.rt, self.forward, self.params = cfg, rt, forward, list(model.requires_grad_(False).parameters())
        if cfg.ttt_mode == "phased":
            self.lr, momentum, self.inside = cfg.global_ttt_lr, cfg.global_ttt_momentum, True
            self.length, self.rows = cfg.global_ttt_chunk_tokens, 1
        else:
            self.lr, momentum, self.inside = cfg.ttt_lr, cfg.ttt_momentum, cfg.varlen_enabled
            self.length, usual = cfg.eval_seq_len, -(-cfg.ttt_chunk_tokens // (cfg.eval_seq_len * rt.world))
            self.rows = max(1, min(cfg.eval_batch_tokens // self.length, usual))
        self.optimizer = torch.optim.SGD(self.params, lr=self.lr, momentum=momentum)

    def step(self, tokens: Tensor, bos: int, lr_scale: float) -> None:
        """One step on the mean loss of tokens (n,), in rows dealt to ranks; the gradient's norm clipped to 1."""
        length, rows, count = self.length, self.rows, len(tokens) - 1
        place = torch.arange(-(-count // (rows * length)) * rows * length, device=tokens.device).view(-1, length)
        ids, targets = gather(tokens, place, place < count, bos)
        for p in self.params:
            p.requires_grad_(True).grad = torch.zeros_like(p)
        for first in range(self.rt.rank * rows, len(ids), self.rt.world * rows):
            part = ids[first : first + rows]
            bounds = Bounds.find(part, bos, self.cfg.eval_seq_len) if self.inside else None
            losses = self.forward(part, targets[first : first + rows], bounds=bounds, loops=self.cfg.num_loops)
            (losses.sum() / count).backward()
        flat = self.rt.sum_(torch.cat([p.grad.flatten() for p in self.params]))
        flat *= torch.clamp(1.0 / (flat.norm() + 1e-6), max=1.0)
        for p, grad in zip(self.params, flat.split([p.numel() for p in self.params])):
            p.grad = grad.view_as(p)
        self.optimizer.param_groups[0]["lr"] = self.lr * lr_scale
        self.optimizer.step()
        for p in self.params:
            p.requires_grad_(False).grad = None


def half_cosine(i: int, last: int) -> float:
    """From 1 at i = 0 to 0 at i = last."""
    return 0.5 * (1 + math.cos(math.pi * i / max(last, 1)))


class Budget:
    """Says whether there is time to adapt: whether the rest, scored without, would still end in EVAL_BUDGET_SECONDS.

    Of the time that is left at the start, 3 % are kept for what comes last, the tilt. How fast the work goes is judged
    once it has taken as much. Half a second that a first batch loses to a GPU's start would otherwise count as the pace
    of all.
    """

    def __init__(self, cfg: Settings, rt: Runtime, began: float, plain: float):
        """`plain`: this rank's work if it adapted to nothing, in any unit. `began`: when the budget's clock did."""
        self.rt, self.plain, self.over, self.last = rt, plain, False, time.perf_counter()
        self.doing, self.done, self.busy = 0.0, 0.0, 0.0  # work in hand, work in all, and the seconds it took
        left = began + (cfg.eval_budget_seconds or math.inf) - self.last
        self.early, self.end = 0.03 * left, self.last + 0.97 * left

    def spend(self, work: float, plain: float) -> bool:
        """Whether to adapt on what is done next: `work`, or `plain` without adapting. Once False, always. What is no
        work takes time, but says nothing about how fast the work goes.
        """
        self.rt.sync()
        now = time.perf_counter()
        self.busy += now - self.last if self.doing else 0.0
        pace = self.busy / self.done if self.done and self.busy > self.early else 0.0
        self.plain -= plain
        self.over = self.over or now + pace * (work + self.plain) > self.end
        self.last, self.doing = now, plain if self.over else work
        self.done += self.doing
        return not self.over


def find_documents(tokens: Tensor, bos: int) -> list[tuple[int, int]]:
    """(first, last + 1) input token of each document of a stream (N,): from its BOS to the next one, which it predicts.

    Together they predict every token but the first of the stream.
    """
    starts = (tokens == bos).nonzero().flatten().tolist()
    starts = starts if starts[:1] == [0] else [0, *starts]
    return [(a, b) for a, b in itertools.pairwise([*starts, len(tokens) - 1]) if b > a]


class Pass(NamedTuple):
    """One forward pass over a batch of documents: a chunk of each, and what stands before it."""

    chunk: int  # which one of each document, from 0
    rows: int  # documents, and padding
    width: int  # tokens of a row
    ending: int  # documents that end with this chunk
    going: int  # documents that go on


def plan_passes(cfg: Settings, batch: list[tuple[int, int]], adapted: bool
                ) -> tuple[list[tuple[int, int, int]], list[Pass]]:
    """(first, end, tokens of a chunk) of each row of a batch of documents, the most chunks first; and its passes.

    Rows of documents that have ended leave the batch by halves, down to an eighth of TTT_BATCH_SIZE, and a pass is no
    wider than its documents are long by then: few shapes, so few graphs. Without adapters chunks are a quarter of
    TTT_EVAL_SEQ_LEN.
    """
    chunks = cfg.ttt_chunks() if adapted else [(math.inf, max(1, cfg.ttt_eval_seq_len // 4))]
    rows = [(a, b, next(chunk for longest, chunk in chunks if b - a <= longest)) for a, b in batch]
    rows.sort(key=lambda row: (row[0] - row[1]) // row[2])
    ends = [-((a - b) // chunk) for a, b, chunk in rows]
    passes, count, going, longest, usual = [], cfg.ttt_batch_size, len(rows), cfg.ttt_eval_seq_len, chunks[-1][1]
    for i in range(ends[0]):
        live, width, reach = going, usual, (i + 1) * max(chunk for _, _, chunk in rows[:going])
        while going and ends[going - 1] == i + 1:
            going -= 1
        while count // 2 >= max(live, 2, cfg.ttt_batch_size // 8):  # a size of 1 would be a graph of its own
            count //= 2
        while width < min(reach, longest):
            width *= 2
        passes.append(Pass(i, count, min(width, longest), live - going, going))
    return rows + [(0, 0, usual)] * (cfg.ttt_batch_size - len(rows)), passes


def batch_cost(cfg: Settings, batch: list[tuple[int, int]], adapted: bool) -> int:
    """Tokens of all forward passes over a batch of documents, and as many for a backward pass where it has one."""
    return (1 + adapted) * sum(p.rows * p.width for p in plan_passes(cfg, batch, adapted)[1])


def document_batches(cfg: Settings, documents: list[tuple[int, int]], ranks: int) -> list[list[list[tuple[int, int]]]]:
    """For each rank its batches of TTT_BATCH_SIZE whole documents, in the order TTT_DOC_ORDER says.

    Batches do not depend on the number of ranks; each goes to the rank with the least work so far, most work first.
    """
    window = {"sequential": 1, "bucketed": cfg.ttt_bucket_window, "sorted": len(documents)}[cfg.ttt_doc_order]
    ordered = [d for i in range(0, len(documents), window)
               for d in sorted(documents[i : i + window], key=lambda d: d[1] - d[0])]
    size = cfg.ttt_batch_size
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    cost = [batch_cost(cfg, batch, True) for batch in batches]
    loads, dealt = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(batches)), key=lambda i: (-cost[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += cost[i]
        dealt[rank].append(i)
    return [[batches[i] for i in sorted(mine)] for mine in dealt]


class DocumentAdapters:
    """LoRA adapters for a batch of documents, one set a virtual layer, and their optimizer (PR 1530, 1536, 1619).

    The adapters are leaves of the autograd graph. The model's weights no longer require gradients.
    """

    def __init__(self, cfg: Settings, model: GPT):
        """A is uniform in ±1/sqrt(in) and the same for every document, whatever its batch. B is zero."""
        device = model.requires_grad_(False).tok_emb.device
        self.cfg, self.lr = cfg, cfg.ttt_lora_lr * cfg.ttt_local_lr_mult
        generator = torch.Generator().manual_seed(0)  # not SEED: the score is the artifact's
        d, kv, rank = cfg.model_dim, model.kv_bank.size(1), cfg.ttt_lora_rank
        shapes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "mlp": (d, d)}  # role -> (in, out)
        beside = {"o": "attn"} if cfg.ttt_lora_o_input == "norm" else {}
        sites = [(Site(beside.get(role, role), *virtual), *shape) for virtual in virtual_layers(cfg, cfg.num_loops)
                 for role, shape in shapes.items() if getattr(cfg, f"ttt_{role}_lora")]
        if cfg.ttt_head_lora:
            sites.append((Site("head"), model.tok_emb.size(1), cfg.vocab_size))
        self.initial = []
        for _, inputs, outputs in sites:
            a = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
            self.initial += [a.to(device), torch.zeros(outputs, rank, device=device)]
        self.sites = [site for site, _, _ in sites]
        # Leaves are the first rows of these. They lie in memory as their gradients do, or AdamW would take them singly.
        self.whole = [t.mT.contiguous().repeat(cfg.ttt_batch_size, 1, 1).mT for t in self.initial]
        self.sums = [torch.zeros_like(a, dtype=torch.float64) for a in self.initial[::2]]  # of A, over documents
        self.seen = torch.zeros(1, dtype=torch.float64, device=device)
        self.take(cfg.ttt_batch_size)

    def take(self, rows: int) -> None:
        """Make the first `rows` documents' adapters the leaves; they keep the storage that they had."""
        self.leaves = [t[:rows].requires_grad_() for t in self.whole]
        scale = self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank
        self.hooks = Hooks(adapters={site: Adapter(*self.leaves[2 * i : 2 * i + 2], scale)
                                     for i, site in enumerate(self.sites)})

    def narrow(self, rows: int) -> None:
        """Go on with the first `rows` documents alone, and with their moments."""
        if rows == len(self.leaves[0]):
            return
        before, state = self.leaves, self.optimizer.state
        self.take(rows)
        self.optimizer.param_groups[0]["params"] = self.leaves
        for old, new in zip(before, self.leaves):
            if old in state:
                state[new] = {name: t[:rows] if t.ndim else t for name, t in state.pop(old).items()}

    def reset(self) -> None:
        """Fresh adapters and optimizer for the next documents."""
        self.take(self.cfg.ttt_batch_size)
        for t, value in zip(self.whole, self.initial):
            t.copy_(value.expand_as(t))
        if self.cfg.ttt_optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.leaves, lr=self.lr, eps=1e-10, foreach=True,
                                               betas=(self.cfg.ttt_beta1, self.cfg.ttt_beta2),
                                               weight_decay=self.cfg.ttt_weight_decay)
        else:
            self.optimizer = torch.optim.SGD(self.leaves, lr=self.lr, foreach=True,
                                             weight_decay=self.cfg.ttt_weight_decay)

    def remember(self, ends: Tensor) -> None:
        """Add the A matrices of the rows (size, 1) whose document `ends` with this chunk to the sums of warm_start().

        Now: until the batch is done these rows get no gradient, but their weights still decay.
        """
        torch._foreach_add_(self.sums, [(a.detach() * ends[..., None]).sum(0, dtype=torch.float64)
                                        for a in self.leaves[::2]])
        self.seen += ends.sum()

    def warm_start(self, rt: Runtime) -> None:
        """Have documents from now on begin with the mean of what A became in those since the last call, on all ranks.

        In PR 1767 a document takes over the A of the one before it in its row of the batch. The mean is the same
        whatever the batches, the order of documents in them and the number of ranks.
        """
        flat = rt.sum_(torch.cat([self.seen, *(t.flatten() for t in self.sums)]))
        means = (flat[1:] / flat[0]).float().split([t.numel() for t in self.sums])
        self.initial[::2] = [mean.view_as(total) for mean, total in zip(means, self.sums)]
        torch._foreach_zero_([self.seen, *self.sums])

    def learn(self, loss: Tensor) -> None:
        """One step. The loss is a sum over documents, so a document's adapters get gradients from its text alone."""
        for leaf, grad in zip(self.leaves, torch.autograd.grad(loss, self.leaves)):
            leaf.grad = grad
        self.optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
#
# In: the model as the artifact gives it, and the validation text. Out: losses of all its targets for the scorer, by
# windows or with test-time training on what has been scored.


def find_windows(cfg: Settings, val: Validation, stride: int) -> Tensor:
    """(n, 2) int64: where in the stream each window of EVAL_SEQ_LEN tokens starts, and from where on it scores.

    The first scores all its tokens, later ones what the window before did not reach: `stride` tokens, the first of them
    with EVAL_SEQ_LEN - stride tokens before it. With VARLEN attention ends at the document's start, so a window that
    starts there has all that its tokens may see: it scores up to its end, and no document that it holds is run again.
    """
    length, windows, fresh = cfg.eval_seq_len, [], 0
    documents = [start for start, _ in find_documents(val.tokens, val.bos)] if cfg.varlen_enabled else [0]
    while fresh < len(val.tokens) - 1:
        start = max(documents[bisect_right(documents, fresh) - 1], fresh - length + stride)
        windows.append((start, fresh))
        fresh = start + length
    return torch.tensor(windows, device=val.tokens.device)


class Evaluator:
    """Scores one text with one model: by windows, or by test-time training, which learns from tokens once they are
    scored, never before. A target's loss is charged to `scorer` when it is known.
    """

    def __init__(self, cfg: Settings, rt: Runtime, model: GPT, forward: Callable, val: Validation,
                 loaded: float | None = None, loops: int | None = None):
        """`forward`: the model, or a compiled form of it. `loaded` as in Scorer; `loops` None: NUM_LOOPS."""
        self.cfg, self.rt, self.model, self.forward, self.val = cfg, rt, model, forward, val
        start, tilt = time.perf_counter(), Tilt.of(cfg, val)
        if tilt and loaded is not None:  # on the clock
            rt.note(f"hints for {len(tilt.places)} targets in {time.perf_counter() - start:.1f}s")
        self.scorer = Scorer(rt, val.bytes, loaded, tilt)
        self.loops = cfg.num_loops if loops is None else loops

    def charge(self, ids: Tensor, targets: Tensor, place: Tensor, scored: Tensor, **options: Any) -> Tensor:
        """Losses (rows, length) of a forward pass over inputs at `place` of the stream, charged where `scored`."""
        at, hints = torch.where(scored, place + 1, 0), self.val.hints
        if hints is not None:
            targets = torch.stack((targets, torch.where(scored, hints[at], IGNORE)))
        losses = self.forward(ids, targets, loops=self.loops, **options).view(-1, *ids.shape)  # the hints' are second
        self.scorer.add(at, *losses.detach())
        return losses[0]

    @torch.no_grad()
    def score_windows(self, windows: Tensor, what: str) -> None:
        """Score by these windows, as find_windows() has them, dealt whole to ranks; `what` names the progress bar."""
        cfg, rt, tokens, bos = self.cfg, self.rt, self.val.tokens, self.val.bos
        length, n, rows = cfg.eval_seq_len, len(tokens), cfg.eval_batch_tokens // cfg.eval_seq_len
        spare = windows.new_tensor([[0, n]]).expand(-len(windows) % rows, 2)  # these score nothing
        batches = torch.cat((windows, spare)).view(-1, rows, 2, 1)
        for batch in rt.progress(batches[rt.rank :: rt.world], what, self.scorer.running):
            start, fresh = batch.unbind(1)
            place = start + torch.arange(length, device=rt.device)  # (rows, length): input tokens in the stream
            scored = (place >= fresh) & (place < n - 1)
            ids, targets = gather(tokens, place, scored, bos)
            bounds = Bounds.find(ids, bos, length) if cfg.varlen_enabled else None
            self.charge(ids, targets, place, scored, bounds=bounds)

    def by_windows(self, stride: int, what: str) -> Score:
        """The score by windows `stride` apart, which do not overlap if that is EVAL_SEQ_LEN, without any adaptation."""
        self.score_windows(find_windows(self.cfg, self.val, stride), what)
        return self.scorer.finish()

    def final(self) -> Score:
        """The evaluation that gives the run's val_bpb."""
        cfg = self.cfg
        if cfg.ttt_mode == "none":
            return self.by_windows(cfg.eval_stride or cfg.eval_seq_len, "sliding")
        plain = self.chunk_ttt() if cfg.ttt_mode == "chunk" else self.lora_ttt()
        if plain:
            self.rt.log(f"EVAL_BUDGET_SECONDS={cfg.eval_budget_seconds:g}: {plain} tokens scored and not trained on")
        return self.scorer.finish()

    def chunk_ttt(self) -> int:
        """Sliding evaluation in chunks, each trained on after it is scored, but for the last (PR 549, 1413, 1493).

        No chunk is trained on any more when the rest would not end within EVAL_BUDGET_SECONDS. Returns how many tokens
        were not.
        """
        cfg, rt, val, size = self.cfg, self.rt, self.val, self.cfg.ttt_chunk_tokens
        sgd, length = Sgd(cfg, rt, self.model, self.forward), cfg.eval_seq_len
        windows = find_windows(cfg, val, cfg.eval_stride or length)
        number = windows[:, 1] // size  # of the chunk that holds the first token a window scores
        chunks = windows.split(number.unique_consecutive(return_counts=True)[1].tolist())
        last, trained, plain = (len(val.tokens) - 2) // size, 0, 0
        scoring = len(windows) * length / len(val.tokens)  # forward passes over each token; three a step, each epoch
        share = scoring / (scoring + 3 * cfg.ttt_epochs)
        budget = Budget(cfg, rt, self.scorer.loaded, len(windows) * share)
        for i, chunk in enumerate(rt.progress(chunks, "ttt", self.scorer.running)):
            adapt = rt.largest(float(not budget.spend(len(chunk), len(chunk) * share))) == 0  # every rank or none
            self.score_windows(chunk, "chunk")
            scored = min(int(chunk[-1, 0]) + length, len(val.tokens) - 1)  # the last target of these windows
            if i + 1 < len(chunks) and adapt:
                # whole chunks, of which windows have scored all targets; by number: nothing depends on later text
                stop = scored // size * size
                for _ in range(cfg.ttt_epochs):
                    sgd.step(val.tokens[trained : stop + 1], val.bos, half_cosine(int(chunk[0, 1]) // size, last))
                trained = stop
            plain += 0 if adapt else scored - int(chunk[0, 1])
        return plain

    def lora_ttt(self) -> int:
        """Score documents with adapters of their own; phased: between parts of the first documents, train all weights.

        Documents are dealt whole to ranks, between cuts that hang on settings alone, never on what is still to come.
        When the rest would not end within EVAL_BUDGET_SECONDS, it is scored without adapters. Returns how many tokens
        were.
        """
        cfg, rt, val = self.cfg, self.rt, self.val
        documents, adapters = find_documents(val.tokens, val.bos), DocumentAdapters(cfg, self.model)
        phases = range(1, cfg.phased_ttt_num_phases + 1) if cfg.ttt_mode == "phased" else ()
        ends = {cfg.phased_ttt_prefix_docs * i // len(phases) for i in phases}  # of phases
        warm = range(0, len(documents), cfg.ttt_warm_start_docs) if cfg.ttt_warm_start_a else ()
        cuts = sorted({0, len(documents), *warm, *(end for end in ends if end < len(documents))})
        dealt = [document_batches(cfg, documents[a:b], rt.world)[rt.rank] for a, b in itertools.pairwise(cuts)]
        budget = Budget(cfg, rt, self.scorer.loaded, sum(batch_cost(cfg, b, False) for mine in dealt for b in mine))
        over, plain, steps = False, 0, 0
        for i, (high, mine) in enumerate(zip(cuts[1:], dealt)):
            for batch in rt.progress(mine, f"ttt {i + 1}/{len(dealt)}", self.scorer.running):
                over = not budget.spend(batch_cost(cfg, batch, True), batch_cost(cfg, batch, False)) or over
                plain += sum(b - a for a, b in batch) if over else 0
                self.score_documents(batch, None if over else adapters)
            over = rt.largest(float(over)) > 0
            if high == len(documents) or over:
                continue
            if cfg.ttt_warm_start_a:
                adapters.warm_start(rt)
            if high in ends:
                sgd, size = Sgd(cfg, rt, self.model, self.forward), cfg.global_ttt_chunk_tokens
                last = (documents[high - 1][1] - 1) // size  # step of what has been scored, on any rank; left out
                for step in range(last):
                    if rt.largest(float(not budget.spend(0, 0))):
                        break
                    sgd.step(val.tokens[step * size : (step + 1) * size + 1], val.bos, half_cosine(step, last))
                    steps += 1
        if phases:
            why = (f": PHASED_TTT_PREFIX_DOCS={cfg.phased_ttt_prefix_docs} of {len(documents)} documents, steps of "
                   f"GLOBAL_TTT_CHUNK_TOKENS={cfg.global_ttt_chunk_tokens}")
            rt.log(f"{steps} steps of all weights{'' if steps else why}")
        return int(rt.sum_(torch.tensor(plain, device=rt.device)))

    def score_documents(self, batch: list[tuple[int, int]], adapters: DocumentAdapters | None) -> None:
        """Score documents chunk by chunk; after each chunk one step of the adapters on the losses just charged.

        A forward pass sees up to TTT_EVAL_SEQ_LEN tokens that end with the chunk, as plan_passes() has them. The last
        chunk of a document is only scored. Without adapters nothing is learned.
        """
        cfg, tokens, usual = self.cfg, self.val.tokens, self.cfg.ttt_chunk_size
        rows, passes = plan_passes(cfg, batch, adapters is not None)
        table = torch.tensor(rows, device=tokens.device).mT[:, :, None]
        if adapters:
            adapters.reset()
        for i, count, width, ending, going in passes:
            starts, ends, chunk = table[:, :count]
            low, high = i * chunk, (i + 1) * chunk
            first = torch.maximum(starts, starts + high - width)  # wherever the document ends: that is yet to come
            place = first + torch.arange(width, device=tokens.device)
            scored = (place >= starts + low) & (place < starts + high) & (place < ends)
            ids, targets = gather(tokens, place, scored, -1)  # a row is of one document: no Bounds
            goes_on = (starts + high < ends) * (usual / chunk)  # (count, 1), with the loss a mean over the chunk
            if adapters:
                adapters.narrow(count)
            with torch.set_grad_enabled(adapters is not None):  # for the last chunk too: one graph for each width
                losses = self.charge(ids, targets, place, scored, hooks=adapters.hooks if adapters else NO_HOOKS)
            if cfg.ttt_warm_start_a and adapters and ending:
                adapters.remember((starts + low < ends) & (starts + high >= ends))
            if adapters and going:  # charged; only now learned from
                adapters.learn((losses * goes_on).sum() / usual)

    def warm_windows(self) -> None:
        """Compile the graph of score_windows(); the text is a random one."""
        rows = self.rt.world * (self.cfg.eval_batch_tokens // self.cfg.eval_seq_len)
        self.score_windows(torch.zeros(rows, 2, dtype=torch.long, device=self.rt.device), "warm-up")

    def warm_ttt(self) -> None:
        """Compile the graphs of test-time training, by a step that changes nothing; the text is a random document."""
        cfg, rt = self.cfg, self.rt
        sgd = Sgd(cfg, rt, self.model, self.forward)
        if cfg.ttt_mode == "chunk":
            self.warm_windows()
        else:
            learning = DocumentAdapters(cfg, self.model)
            rt.log(f"adapters: {16 * sum(t.numel() for t in learning.leaves) / 1e6:.1f} MB with gradients and moments")
            size, last = cfg.ttt_batch_size, len(self.val.tokens) - 1
            few = [(size // (row + 1)).bit_length() * cfg.ttt_chunk_size for row in range(max(1, size // 8), size)]
            batch = [(0, last)] * (size - len(few)) + [(0, min(n, last)) for n in few]  # half leave at each pass
            for adapters in (learning, None):
                self.score_documents(batch, adapters)
        if cfg.ttt_mode != "lora":
            sgd.step(self.val.tokens.repeat(rt.world * sgd.rows), self.val.bos, 0.0)  # something for each rank
        self.model.requires_grad_(True)  # as it was: other stages' graphs hang on it


def random_text(cfg: Settings, val: Validation) -> Validation:
    """One document of random tokens, long enough for every shape of an evaluation."""
    length = max(cfg.eval_seq_len, cfg.ttt_eval_seq_len + 2 * cfg.ttt_chunk_size)
    tokens = torch.randint(cfg.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(cfg.seed))
    return val.over(tokens.to(val.tokens))


# ----------------------------------------------------------------------------------------------------------------------
# Reading settings
#
# In: environment variables. Out: Settings, and notes of what was said under other names or cannot be done here. A
# misspelt name or a value that a setting does not take ends the run in one line.


LARGEST = 1e30  # of a setting: float32 holds 3e38, and optimizers divide learning rates by small numbers
ORDINARY = ("COMPILER", "TYPE")  # one letter from a setting, but set by clusters' modules and by build scripts
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "0 or 1", str: "text"}
# Settings of the field's other scripts that have no like here, each with the value that asks for nothing more than this
# script does: off, what is built in, or what another setting says. With * none does: it changes no figure.
ELSEWHERE = dict(pair.split("=", 1) for pair in """
AGREE_ADD_BOOST=0 ASYM_LOGIT_RESCALE=0 ATTN_GATE_ENABLED=0 ATTN_OUT_GATE_SRC=proj AWQ_LITE_BITS=* AWQ_LITE_ENABLED=0
AWQ_LITE_GROUP_SIZE=* AWQ_LITE_GROUP_TOP_K=* EMA_START_FRAC=0 EMBED_LR=0.6 ETLB_CLIP=3 ETLB_ENABLED=0 ETLB_LR=0.05
ETLB_STEPS=5 EVAL_INCLUDE_TAIL=1 FUSED_CE_ENABLED=* G1_GATING=0 GATED_ATTN_INIT_STD=0.01 GATED_ATTN_QUANT_GATE=*
GLOBAL_TTT_BATCH_SEQS=32 GLOBAL_TTT_EPOCHS=1 GLOBAL_TTT_GRAD_CLIP=1 GLOBAL_TTT_MUON_NESTEROV=1
GLOBAL_TTT_MUON_NS_STEPS=5 GLOBAL_TTT_OPTIMIZER=sgd GLOBAL_TTT_RESPECT_DOC_BOUNDARIES=1 GLOBAL_TTT_WARMUP_CHUNKS=0
GLOBAL_TTT_WARMUP_START_LR=0 GPTQ_BLOCK_SIZE=* GPTQ_ENABLED=1 LAWA_ENABLED=0 LAWA_FREQ=50 LAWA_K=5 LAYER_SCALE_INIT=1
LQER_ASYM_ENABLED=1 MTP_LOSS_WEIGHT=0 MTP_NUM_HEADS=0 MUON_BETA2=0.95 MUON_EQR_EPS=1e-7 MUON_HUBER_DELTA=0.1
MUON_HUBER_WD=0 NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 OPTROT_ENABLED=0 PREQUANT_TTT_ENABLED=0 QAT_LITE_TARGETS=qk
QK_BITS=MATRIX_BITS QK_CLIP_SIGMAS=MATRIX_CLIP_SIGMAS QK_GAIN_SCHEDULE=[] QRES_ENABLED=0 QRES_LAYER_START=7 QRES_RANK=1
QRES_TARGETS=qk ROPE_TRAIN_SEQ_LEN=TRAIN_SEQ_LEN SLIDING_WINDOW_ENABLED=1 SLOT_ENABLED=0 SLOT_LR=0.005 SLOT_STEPS=8
SMEAR_GATE_BOS_FIX=1 SPARSE_ATTN_GATE_INIT_STD=0 TARGET_MB=0 TRAIN_SEQ_SCHEDULE_MODE=wallclock TTT_ADAPTIVE_LR=0
TTT_BATCH_SEQS=32 TTT_EVAL_BATCHES=0 TTT_FREEZE_BLOCKS=0 TTT_GRAD_CLIP=1 TTT_GRAD_STEPS=1 TTT_GRAD_STEPS_CLEAN=0
TTT_LORA_EMA_DECAY=0 TTT_LR_DECAY=1 TTT_OUTPUT_DIR=0 TTT_PHASES=1 TTT_POLYAK_DECAY=0 TTT_SHORT_CHUNK_SIZE=*
TTT_SHORT_DOC_LEN=* TTT_SHORT_SCORE_FIRST_ENABLED=* TTT_TARGET_LAYERS=0 TTT_UPDATE_EVERY=1
VAL_BATCH_SIZE=* VAL_BATCH_TOKENS=* VAL_DOC_FRACTION=1 WARMDOWN_ITERS=0 WITHIN_BOOST=0 WITHIN_TAU=99 WORD_BOOST=0
WORD_NORMALIZE=strip_punct_lower WORD_ORDER=4 WORD_TAU=99
""".split())
WHY_NOT = {  # where more can be said than that a setting is not in this script
    "AWQ_LITE_ENABLED": "not in this script; QUANT_ALLOCATION=auto sets steps by the loss's sensitivity instead",
    "ASYM_LOGIT_RESCALE": "not in this script; without effect in PR 2135, where no optimizer holds its two numbers",
    "SMEAR_GATE_BOS_FIX": "not done; the smear gate never reaches over a document's start, in training neither"}


def check_range(f: dataclasses.Field, value, source: str = "") -> None:
    """Raise RunError, naming `source`, unless `value` has the field's type and range; None (auto) if it is default."""
    meta, kind, name = f.metadata, kind_of(f), source or f.name.upper()
    if value is None and f.default is None:
        return
    if type(value) is not kind and (type(value), kind) != (int, float):  # a whole number is a number too
        raise RunError(f"{name}={value}: takes {TYPE_NAMES[kind]}")
    if meta["choices"] and value not in meta["choices"]:
        raise RunError(f"{name}={value}: takes one of {', '.join(meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if kind in (int, float) and not low <= value <= (math.inf if high is None else high):  # `not` also stops nan
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RunError(f"{name}={value}: takes {TYPE_NAMES[kind]} {bounds}")
    if kind is float and abs(value) > LARGEST:
        raise RunError(f"{name}={value:g}: takes numbers up to {LARGEST:g}")


def model_contradictions(cfg: Settings) -> list[tuple[Any, str, str]]:
    """What of the model cannot all hold: each row has what is wrong, the setting that does not fit, then those it has
    to fit, and what it takes.
    """
    head_dim = cfg.model_dim // cfg.num_heads
    return [
        (cfg.model_dim % cfg.num_heads, "num_heads model_dim", f"a divisor of MODEL_DIM={cfg.model_dim}"),
        (cfg.num_heads % cfg.num_kv_heads, "num_kv_heads num_heads", f"a divisor of NUM_HEADS={cfg.num_heads}"),
        (cfg.rope_dims % 2 or cfg.rope_dims > head_dim, "rope_dims model_dim num_heads",
         f"an even number up to {head_dim}, the width of a head"),
        (int(cfg.mlp_mult * cfg.model_dim) < 1, "mlp_mult model_dim", "at least 1/MODEL_DIM"),
        (cfg.num_loops and not cfg.loop_start <= cfg.loop_end < cfg.num_layers,
         "loop_end loop_start num_layers num_loops recur_blend",
         f"a layer from LOOP_START={cfg.loop_start} to {cfg.num_layers - 1}"),
        (cfg.num_loops and cfg.parallel_mode != "gptj" and cfg.parallel_start_layer <= cfg.loop_end,
         "parallel_start_layer loop_end parallel_mode num_loops recur_blend",
         f"more than LOOP_END={cfg.loop_end} with PARALLEL_MODE={cfg.parallel_mode}"),
        (cfg.gated_attn_enabled + cfg.sparse_attn_gate_enabled + cfg.attn_out_gate_enabled > 1,
         "gated_attn_enabled" if cfg.gated_attn_enabled else "sparse_attn_gate_enabled",
         "0 beside another of the three output gates"),
        ((cfg.sparse_attn_gate_enabled or cfg.attn_out_gate_enabled or cfg.smear_gate_enabled) and
         cfg.gate_window > cfg.model_dim, "gate_window model_dim", f"at most MODEL_DIM={cfg.model_dim}"),
        *((getattr(cfg, n) == 1, n, "0 or at least 2")
          for n in ("bigram_vocab_size", "ve_bigram_rows", "ve_dim", "embedding_dim")),
        (cfg.rope_yarn and cfg.rope_dims < 4, "rope_dims rope_yarn", "at least 4 with ROPE_YARN=1"),
        (cfg.ve_enabled and not cfg.ve_layer_list(), "ve_layers num_layers ve_enabled",
         f"different layers below NUM_LAYERS={cfg.num_layers}, as 9,10"),
        (cfg.qat_lite_enabled and cfg.qat_lite_layer_start >= cfg.num_layers,
         "qat_lite_layer_start num_layers qat_lite_enabled", f"a layer below NUM_LAYERS={cfg.num_layers}"),
        (cfg.num_loops and not cfg.loop_stages(), "loop_schedule num_loops recur_blend",
         f"stages in order, as 0.35:1,0.55:2, that end in NUM_LOOPS={cfg.num_loops}, the most"),
    ]


def run_contradictions(cfg: Settings) -> list[tuple[Any, str, str]]:
    """The like of training, quantization and evaluation."""
    trains, last = not cfg.eval_only, (cfg.loop_stages() or [(0.0, 0)])[-1][0]  # when training takes NUM_LOOPS
    adapters = [f"ttt_{role}_lora" for role in ("q", "k", "v", "o", "mlp", "head")]
    return [
        (trains and (last == 1 or (last > 1 and 0 < cfg.iterations <= last)),
         f"{'loop_schedule' if cfg.loop_schedule else 'enable_looping_at'} iterations num_loops recur_blend",
         "a share below 1 or a step below ITERATIONS, or no step of training has NUM_LOOPS"),
        *((trains and on and lr_factor(cfg, 1.0) >= getattr(cfg, name), f"{name} min_lr warmdown_frac {switch}",
           f"more than {lr_factor(cfg, 1.0):g}, below which no learning rate comes")
          for on, name, switch in ((cfg.qat_enabled, "qat_start_scale", "qat_enabled"),
                                   ("swa" in cfg.average, "swa_start_scale", "swa_enabled average"))),
        (cfg.train_batch_tokens % cfg.train_seq_len, "train_batch_tokens train_seq_len",
         f"a multiple of TRAIN_SEQ_LEN={cfg.train_seq_len}"),
        ((cfg.micro_batch_tokens or cfg.train_seq_len) < cfg.train_seq_len,
         "micro_batch_tokens train_seq_len", f"at least TRAIN_SEQ_LEN={cfg.train_seq_len}"),
        ((cfg.eval_batch_tokens or cfg.eval_seq_len) < cfg.eval_seq_len,
         "eval_batch_tokens eval_seq_len train_seq_len", f"at least EVAL_SEQ_LEN={cfg.eval_seq_len}"),
        ("ema" in cfg.average and "swa" in cfg.average and not cfg.ema_decay, "average ema_decay",
         "swa, since EMA_DECAY=0 keeps no EMA"),
        ("swa" in cfg.average and not cfg.swa_enabled, "average swa_enabled", "ema, or SWA_ENABLED=1"),
        (cfg.eval_stride > cfg.eval_seq_len, "eval_stride eval_seq_len train_seq_len",
         f"at most EVAL_SEQ_LEN={cfg.eval_seq_len}"),
        (cfg.ttt_mode in ("lora", "phased") and cfg.ttt_chunk_size > cfg.ttt_eval_seq_len,
         "ttt_chunk_size ttt_eval_seq_len eval_seq_len train_seq_len ttt_mode",
         f"at most TTT_EVAL_SEQ_LEN={cfg.ttt_eval_seq_len}"),
        (cfg.ttt_mode in ("lora", "phased") and not any(getattr(cfg, name) for name in adapters),
         " ".join(("ttt_mode", *adapters)), "an adapter, as TTT_Q_LORA=1"),
        (not cfg.seq_stages(), "train_seq_schedule", "windows, each up to a share of training, as 1024@0.1,2048@0.7"),
        (cfg.rope_yarn and cfg.ttt_mode in ("lora", "phased") and cfg.ttt_short_score_first_steps
         and cfg.ttt_eval_seq_len > cfg.train_seq_len,
         "rope_yarn ttt_short_score_first_steps ttt_eval_seq_len eval_seq_len ttt_mode",
         "0, or the rotary base of a document would hang on the others of its batch"),
        (not cfg.token_orders(), "token_order", "numbers from 64 down to 2, as 16,8,4"),
        (not cfg.ttt_chunks(), "ttt_short_score_first_steps", "ascending lengths, each with a chunk, as 256:8,2000:24"),
        (not (cfg.iterations or cfg.max_wallclock_seconds), "iterations max_wallclock_seconds",
         "a number of steps, since MAX_WALLCLOCK_SECONDS=0 sets no clock"),
        (cfg.max_wallclock_seconds and (cfg.gptq_reserve_seconds or 0) >= cfg.max_wallclock_seconds,
         "gptq_reserve_seconds max_wallclock_seconds",
         f"less than MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}"),
    ]


def check_contradictions(cfg: Settings, given: set[str]) -> None:
    """Raise RunError for the first settings that cannot all hold, naming one of those `given` first."""
    for wrong, names, takes in model_contradictions(cfg) + run_contradictions(cfg):
        if wrong:
            name, *others = names.split()
            blamed = next((n for n in (name, *others) if n in given), name)
            said, unfit = (f"{n.upper()}={shown(getattr(cfg, n))}" for n in (blamed, name))
            raise RunError(f"{unfit}: takes {takes}" if said == unfit else f"{said}: {unfit} takes {takes}")


def kind_of(f: dataclasses.Field) -> type:
    """The type of a field's values: its default's, or T where it is annotated `T | None`."""
    return f.type.__args__[0] if f.default is None else type(f.default)


def parse_value(f: dataclasses.Field, name: str, raw: str):
    """The typed value of environment variable `name`; RunError when `raw` is not one that the setting takes."""
    kind = kind_of(f)
    if f.default is None and raw.lower() == "auto":
        return None
    try:
        value = {"0": False, "1": True}[as_digit(raw)] if kind is bool else kind(raw)
    except (KeyError, ValueError):
        auto = " or auto" if f.default is None else ""
        raise RunError(f"{name}={raw}: takes {TYPE_NAMES[kind]}{auto}") from None
    check_range(f, value, name)
    return value


def parse_numbers(text: str) -> list[int]:
    """The numbers of a list like 9,10; none if it is not such a list."""
    return [int(n) for n in text.split(",")] if re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII) else []


def parse_pairs(text: str, left: str = r"\d{1,9}", right: str = r"\d{1,9}", between: str = ":"
                ) -> list[tuple[str, str]]:
    """The pairs of a list like 256:8,2000:24, whose sides match these patterns; none if it is not such a list."""
    pairs = re.findall(rf"({left}){between}({right})", text)
    return pairs if text == ",".join(map(between.join, pairs)) else []


def as_digit(raw: str) -> str:
    """`true` and `false` as 1 and 0; other text as it is."""
    return {"true": "1", "false": "0"}.get(raw.lower(), raw)


def shown(value: Any) -> Any:
    """A setting's value as the environment has it."""
    return int(value) if isinstance(value, bool) else value


def layers_in_a_row(raw: str) -> list[str]:
    """RECUR_LAYERS as a list. RunError unless its layers follow each other."""
    layers = raw.split(",")
    if not layers[0].isdigit() or layers != [str(int(layers[0]) + i) for i in range(len(layers))]:
        raise RunError(f"RECUR_LAYERS={raw}: takes layers that follow each other, as 4,5")
    return layers


class Notes(NamedTuple):
    """What the environment says."""

    explicit: dict[str, Any]  # field -> value, what the user set
    aliases: dict[str, str]  # environment name and value as given -> what it set
    ignored: tuple[str, ...]  # unknown names that start or look like one of ours
    absent: tuple[str, ...] = ()  # a line for each setting of other scripts that asks for what this one has not


def read_settings(environ: dict[str, str]) -> tuple[Settings, Notes]:
    """Settings from environment variables. RunError on a bad value, a contradiction or a misspelt name."""
    notes = read_environment(environ)
    return Settings(**notes.explicit), notes


def environment_names() -> list[tuple[str, dataclasses.Field, Any]]:
    """Every name by which the environment gives a setting, with its field and the `values` that allowed_by() takes."""
    return [(name, f, values) for f in dataclasses.fields(Settings)
            for name, values in ({f.name.upper(): {}} | f.metadata["aliases"]).items()]


def read_environment(environ: dict[str, str]) -> Notes:
    """The values of all environment variables that are settings or their aliases, each checked by itself."""
    names = environment_names()
    allowed, source, spelt = {}, {}, []
    for name, f, values in (entry for entry in names if entry[0] in environ):
        raw = environ[name].strip()
        options = allowed_by(f, name, values, raw)
        left = [value for value in allowed.get(f.name, options) if value in options]
        if not left:
            raise RunError(f"{name}={raw}: contradicts {source[f.name]}={environ[source[f.name]]}")
        if left != allowed.get(f.name):
            allowed[f.name], source[f.name] = left, name
        if name != f.name.upper() or raw in values:
            spelt.append((f"{name}={raw}", f.name))
    chosen, aliases = {name: left[0] for name, left in allowed.items()}, {}
    for given, name in spelt:
        aliases[given] = f"{aliases.get(given, '')} {name.upper()}={shown(chosen[name])}".strip()
    known = {name for name, _, _ in names}
    families = {name.split("_")[0] for name in known | set(ELSEWHERE) if "_" in name} - {"RUN", "DATA", "SAVE"}
    ignored, absent = [], []
    for name in sorted(set(environ) - known):
        meant = name not in ELSEWHERE and next((k for k in sorted(known) if is_typo(name.upper(), k)), None)
        if meant and name not in ORDINARY:
            raise RunError(f"{name}={environ[name]}: no such setting; did you mean {meant}?")
        if name in ELSEWHERE and asks_for_more(name, environ[name].strip(), chosen):
            absent.append(f"{name}={environ[name].strip()}: {WHY_NOT.get(name, 'not in this script')}")
        elif meant or (name not in ELSEWHERE and "_" in name and name.split("_")[0] in families):
            ignored.append(name)
    return Notes(chosen, aliases, tuple(ignored), tuple(absent))


def allowed_by(f: dataclasses.Field, name: str, values: dict[str, str] | Callable[[str], str], raw: str) -> list[Any]:
    """The values that NAME=raw leaves to its field, the likeliest first; `values` as in `setting`."""
    # a blank may be a shell variable that is not set: a path that is lost must not start a training
    if not raw and (f.default != "" or f.name == "eval_only"):
        raise RunError(f"{name}=: takes {TYPE_NAMES[kind_of(f)]}, not a blank; unset it for the default")
    word = as_digit(raw)
    if values and name != f.name.upper() and not callable(values) and word not in values:
        raise RunError(f"{name}={raw}: takes one of {', '.join(sorted(values))}")
    words = values(raw).split() if callable(values) else values[word].split() if word in values else [raw]
    return [parse_value(f, name, word) for word in words]


def asks_for_more(name: str, raw: str, chosen: dict[str, Any]) -> bool:
    """Whether NAME=raw, of ELSEWHERE, asks for what this script does not do anyway."""
    done, raw = ELSEWHERE[name], as_digit(raw)
    if field := Settings.__dataclass_fields__.get(done.lower()):
        done = str(chosen.get(field.name, field.default))
    try:
        return done != "*" and raw != "" and float(raw) != float(done)
    except ValueError:  # words
        return raw != done


def is_typo(name: str, known: str) -> bool:
    """True when the two are equal or one inserted, dropped, changed or swapped character apart."""
    head = len(os.path.commonprefix([name, known]))
    a, b = name[head:], known[head:]
    tail = len(os.path.commonprefix([a[::-1], b[::-1]]))
    a, b = a[: len(a) - tail], b[: len(b) - tail]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])


def adopt_settings(notes: Notes, stored: dict[str, Any], name: str) -> Settings:
    """Settings to evaluate an artifact: its own, except what the user set. RunError where the weights would not fit."""
    wrong = set(stored) ^ set(artifact_settings(Settings()))
    if wrong:
        raise RunError(f"{name}: made by another version of this script (it differs in {min(wrong).upper()})")
    fixed = ("vocab_size", "caseops_enabled", *Settings.group("model"))  # where auto is what the artifact has
    given = {key: value for key, value in notes.explicit.items() if value is not None or key not in fixed}
    if given.get("embedding_dim") == stored["model_dim"]:
        given["embedding_dim"] = 0
    for key in (*fixed, *(["train_seq_len"] if stored["rope_yarn"] else [])):
        if given.get(key, stored[key]) != stored[key]:
            raise RunError(f"{name}: made with {key.upper()}={stored[key]}, this run has {given[key]}")
    try:
        window = given.get("train_seq_len", stored["train_seq_len"])
        if given.get("ttt_mode", stored["ttt_mode"]) != stored["ttt_mode"]:
            given.setdefault("eval_stride", None)  # auto hangs on it
        return Settings(**({"train_batch_tokens": window} | stored | given))
    except RunError as e:
        raise RunError(f"{name}: {e}") from None


def settings_to_score(notes: Notes, artifact: bytes, name: str) -> Settings:
    """Settings to evaluate an artifact, as adopt_settings() has them; its compressor is the one that packed it."""
    stored, compressor, *_ = open_artifact(artifact, name)
    return dataclasses.replace(adopt_settings(notes, stored, name), compressor=compressor)


def changes(cfg: Settings, chosen: Iterable[str]) -> str:
    """Settings that differ from their defaults, a line for each group; an `auto` one only where it was `chosen`."""
    groups = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if value != f.default and (f.name in chosen or f.default is not None):
            groups.setdefault(f.metadata["group"], []).append(f"{f.name.upper()}={shown(value)}")
    return "".join(f"\n  {group:6}{' '.join(words)}" for group, words in groups.items()) or " none"


def help_text() -> str:
    """Every setting by group: name, type, default, meaning."""
    lines = ["usage: [NAME=value ...] python train_gpt.py [--help | --config]",
             "       [NAME=value ...] torchrun --standalone --nproc_per_node=N train_gpt.py", "",
             "[PR n]: a record ran with this default at full size, on three seeds. [log]: docs/log.md has our figures.",
             ""]
    for group in dict.fromkeys(f.metadata["group"] for f in dataclasses.fields(Settings)):
        lines.append(f"{group}:")
        for name in Settings.group(group):
            f = Settings.__dataclass_fields__[name]
            default = "auto" if f.default is None else shown(f.default)
            choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
            also = [a for a in f.metadata["aliases"] if a != name.upper()]
            alias = f" [{f.metadata['proof']}]" if f.metadata["proof"] else ""
            alias += f" [also {', '.join(also)}]" if also else ""
            kind = kind_of(f).__name__
            lines.append(f"  {name.upper():28}{kind:6}{default!s:13}{f.metadata['help']}{choices}{alias}")
        lines.append("")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Main
#
# In: arguments and environment. Out: the files of a run and its exit status.


def fit_to_device(cfg: Settings, rt: Runtime) -> Settings:
    """Resolve the `auto` values that depend on the device."""
    most = 8192
    if rt.device.type == "cuda":
        share = min(1.0, torch.cuda.get_device_properties(rt.device).total_memory / 80e9)
        most = int(-98304 * rt.largest(-share))  # of the smallest GPU: all ranks must deal the same rows
    micro = cfg.micro_batch_tokens or max(cfg.train_seq_len, most)
    return dataclasses.replace(cfg, micro_batch_tokens=micro,
                               eval_batch_tokens=cfg.eval_batch_tokens or max(micro, cfg.eval_seq_len))


class Run:
    """One run: its settings, its stages, and the result they add up to."""

    def __init__(self, cfg: Settings, notes: Notes, rt: Runtime):
        self.cfg, self.rt, self.started = cfg, rt, datetime.now(timezone.utc)
        self.stages: dict[str, Score] = {}
        self.loaded = None  # when the evaluation's clock began
        # inputs first: a run that cannot start leaves the folder, and what is in it, alone
        shard_paths(cfg, "val")  # who has no data at all is told so, and not that a tokenizer is missing
        self.val = Validation.load(cfg, read_tokenizer(cfg.tokenizer_path, cfg.vocab_size, cfg.bos_id), rt.device)
        self.windows = None if cfg.eval_only else Windows(cfg, rt, self.val.bos)
        if cfg.resume and not cfg.eval_only:
            read_checkpoint(cfg, rt.path("checkpoint.pt"), self.windows.identity(), torch.device("cpu"))
        self.attention, ops = agree_on_attention(cfg, rt), pick_ops(cfg, rt.device)
        self.code = pack_code(read_code()) if rt.rank == 0 else b""
        if cfg.compressor != "lzma":  # a package that is missing is told now, not after training
            import_packer({"ans": "constriction"}.get(cfg.compressor, cfg.compressor))
        rt.open_logs(append=bool(cfg.resume or cfg.eval_only), training=not cfg.eval_only)
        self.device = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else "cpu"
        compiled = rt.device.type == "cuda" if cfg.compile == "auto" else cfg.compile == "1"
        rt.note(f"settings: {json.dumps(dataclasses.asdict(cfg))}")
        rt.log(f"settings, where not the default:{changes(cfg, notes.explicit)}")
        for given, meant in notes.aliases.items():
            rt.log(f"alias: {given} taken as {meant}")
        if notes.ignored:
            rt.log(f"ignored, no such setting: {', '.join(notes.ignored)}")
        for line in notes.absent:
            rt.log(line)
        rt.log(f"environment: python {sys.version.split()[0]}, torch {torch.__version__}, {rt.world} x {self.device}, "
               f"dtype {str(rt.dtype)[6:]}, attention {self.attention.name} of {self.attention.source}, "
               f"compiled {'yes' if compiled else 'no'}")
        for why in self.attention.skipped:
            rt.log(f"attention: not {why}")
        complete = {None: "unknown, no manifest", True: "yes", False: "NO, unlike the manifest"}
        rt.log(f"validation: {self.val.docs} documents, {len(self.val.tokens)} tokens, "
               f"{int(self.val.bytes.sum(dtype=torch.int64))} bytes, complete: {complete[self.val.complete]}"
               f"{f', {len(self.val.pairs)} pairs of tokens fused' if self.val.pairs else ''}")
        self.model = build_model(cfg, rt, self.attention.run, self.val.bos, ops, self.val.pairs)
        rt.log(f"model: {sum(p.numel() for p in self.model.parameters()):,} parameters")
        # the second for test-time training
        self.forward, self.final_forward = compile_model(self.model) if compiled else (self.model, self.model)

    def evaluator(self, forward: Callable, loops: int | None = None, val: Validation | None = None) -> Evaluator:
        return Evaluator(self.cfg, self.rt, self.model, forward, val or self.val, self.loaded, loops)

    def stage(self, name: str, stride: int, loops: int | None = None) -> Score:
        """Evaluate by windows `stride` apart, or if that is 0 by test-time training; log the score and return it."""
        evaluator = self.evaluator(self.forward if stride else self.final_forward, loops)
        score = evaluator.by_windows(stride, name) if stride else evaluator.final()
        self.rt.log(f"stage:{name} val_loss:{score.val_loss:.6f} val_bpb:{score.val_bpb:.6f} tokens:{score.tokens} "
                    f"bytes:{score.bytes} seconds:{score.seconds:.1f}")
        self.rt.metric(stage=name, val_loss=score.val_loss, val_bpb=score.val_bpb, seconds=score.seconds)
        return score

    def train(self) -> tuple[bytes, dict[str, Any]]:
        """Train, calibrate, quantize and pack; returns the artifact and the training part of the result."""
        cfg, rt = self.cfg, self.rt
        trainer = Trainer(cfg, rt, self.model, self.forward, self.windows.identity())
        plan, first = trainer.plan, 0
        rt.log(f"training: {self.windows.count} rows of {cfg.row_tokens} tokens; a step is {plan.windows} of them, "
               f"{plan.micro} forward passes of {plan.size} on each rank")
        if cfg.warmup_steps:
            self.evaluator(self.forward, val=random_text(cfg, self.val)).warm_windows()
        clock = Clock(rt, cfg.max_wallclock_seconds, *warm_up(cfg, rt, trainer))
        rt.log(f"warm-up done; training clock {clock.limit:.0f}s, {clock.reserve:.1f}s of it kept for calibration")
        if cfg.resume:
            first, clock.spent = trainer.load()
            rt.forget_after(first)
            rt.log(f"resumed at step {first}, {clock.spent:.1f}s on the clock")
        feeder = Feeder(self.windows, plan, first * plan.windows)
        steps = train(cfg, rt, trainer, feeder, clock,
                      lambda step, loops: self.stage(f"step{step}", cfg.eval_seq_len, loops), first)
        feeder.close()
        loop_seconds = rt.largest(clock.seconds())
        kept = trainer.use_average()
        if cfg.gptq_calibration != "train":
            clock.stop()
        stats = calibrate(cfg, rt, self.model, self.windows, steps * plan.windows, clock)
        seconds, tokens = rt.largest(clock.stop()), steps * cfg.train_batch_tokens
        rt.log(f"trained {steps} steps, {tokens} tokens in {seconds:.1f}s, {seconds - loop_seconds:.1f}s of it "
               f"calibration{'; OVER the clock' if clock.limit and seconds > clock.limit else ''}; kept: {kept}")
        if cfg.save_model and rt.rank == 0:
            save_tensors(rt, "final_model.pt", self.model.state_dict(), "no final_model.pt")
        self.stages["pre_quant"] = self.stage("pre_quant", cfg.eval_seq_len)
        return self.compress(stats), {"steps": steps, "train_seconds": seconds, "tokens_seen": tokens,
                                          "tok_per_s": tokens / max(loop_seconds, 1e-9)}

    def compress(self, stats: Statistics) -> bytes:
        """Quantize and pack; on every rank the artifact's bytes, rank 0's as read back from disk."""
        cfg, rt, start = self.cfg, self.rt, time.perf_counter()
        state, room = dict(self.model.named_parameters()), cfg.artifact_budget_bytes - int(rt.largest(len(self.code)))
        if cfg.quant_allocation == "auto":
            artifact = fill_budget(cfg, rt, state, stats, room)
        else:
            stored = quantize(cfg, rt, state, factorize_all(stats.hessians))
            artifact = prune(artifact_settings(cfg), stored, cfg.compressor, room) if rt.rank == 0 else None
        rt.log(f"quantized and packed in {time.perf_counter() - start:.1f}s")
        if rt.rank == 0:
            atomic_write(rt.path("final_model.int6.ptz"), artifact)
            with open(rt.path("final_model.int6.ptz"), "rb") as file:
                artifact = file.read()
        return rt.share_bytes(artifact)

    def load(self, artifact: bytes, name: str) -> None:
        """Put the artifact's weights into the model."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(math.nan)  # nothing of the trained model may reach the score but through these bytes
        load_weights(self.model, self.cfg, read_artifact(artifact, name)[1], name)

    def compile_ahead(self, stages: list[str]) -> None:
        """Compile what these stages run, on a random text before their clock starts, as training's warm-up does."""
        start, text = time.perf_counter(), random_text(self.cfg, self.val)
        if stages != ["ttt"]:
            self.evaluator(self.forward, val=text).warm_windows()
        if "ttt" in stages:
            self.evaluator(self.final_forward, val=text).warm_ttt()
        self.rt.sync()
        seconds = self.rt.largest(time.perf_counter() - start)  # all wait, or the first would wait on its clock
        self.rt.note(f"warm-up: evaluation compiled in {seconds:.1f}s, before its clock")

    def score(self, artifact: bytes, name: str) -> float:
        """Load the artifact and run the stages; returns the seconds from loading to the last score.

        EVAL_STAGES=final leaves only the last stage in that time. A run that trained has then taken the score of the
        compressed weights before it.
        """
        cfg = self.cfg
        stages = ["quantized", *["sliding"] * bool(cfg.eval_stride), *["ttt"] * (cfg.ttt_mode != "none")]
        if cfg.eval_stages == "final":
            if not cfg.eval_only and len(stages) > 1:
                self.load(artifact, name)
                self.stages["quantized"] = self.stage("quantized", cfg.eval_seq_len)
            stages = stages[-1:]
        if self.forward is not self.model:
            self.compile_ahead(stages)
        self.loaded = time.perf_counter()
        self.load(artifact, name)
        self.val = dataclasses.replace(self.val)  # what was derived from the text is made anew, on this clock
        for stage in stages:
            stride = {"quantized": cfg.eval_seq_len, "sliding": cfg.eval_stride, "ttt": 0}[stage]
            self.stages[stage] = self.stage(stage, stride)
        return self.rt.largest(time.perf_counter() - self.loaded)

    def execute(self, artifact: bytes | None = None) -> int:
        """The whole run; with an `artifact` only its evaluation. Returns the exit status (of rank 0, which writes)."""
        cfg, rt, trained = self.cfg, self.rt, {"steps": 0, "train_seconds": 0.0, "tokens_seen": 0, "tok_per_s": 0.0}
        name = cfg.eval_only or rt.path("final_model.int6.ptz")
        if artifact is None:
            artifact, trained = self.train()
        total = len(artifact) + len(self.code)
        fits = total <= cfg.artifact_budget_bytes
        verdict = "fits" if fits else (f"OVER by {total - cfg.artifact_budget_bytes}; lower NUM_LAYERS, MODEL_DIM or "
                                       "VOCAB_SIZE, or take QUANT_ALLOCATION=auto and COMPRESSOR=ans")
        rt.log(f"artifact: model {len(artifact)} + code {len(self.code)} = {total} bytes, budget "
               f"{cfg.artifact_budget_bytes}: {verdict}")
        eval_seconds, final = self.score(artifact, name), list(self.stages.values())[-1]
        peak_memory = int(rt.largest(rt.peak_memory()))
        result = {
            "val_loss": final.val_loss, "val_bpb": final.val_bpb,
            "stages": {stage: score._asdict() for stage, score in self.stages.items()},
            "val_docs": self.val.docs, "val_tokens": final.tokens, "val_bytes": final.bytes,
            "val_complete": self.val.complete,
            "model_bytes": len(artifact), "code_bytes": len(self.code), "bytes_total": total,
            "model_sha256": hashlib.sha256(artifact).hexdigest(), "code_sha256": hashlib.sha256(self.code).hexdigest(),
            "budget_bytes": cfg.artifact_budget_bytes, "fits": fits, **trained, "eval_seconds": eval_seconds,
            "peak_memory_bytes": peak_memory, "seed": cfg.seed, "world_size": rt.world, "device": self.device,
            "torch": torch.__version__, "attention": self.attention.name, "config": dataclasses.asdict(cfg),
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if rt.rank == 0:
            atomic_write(rt.path("train_gpt.packed.py"), self.code)
            atomic_write(rt.path("result.json"), json.dumps(result, indent=1, allow_nan=False).encode())
        part = "; of a PARTIAL validation set" if self.val.complete is False else ""
        rt.log(f"final val_loss:{final.val_loss:.8f} val_bpb:{final.val_bpb:.8f} bytes_total:{total} "
               f"in {rt.path('result.json')}{part}")
        rt.largest(0.0)  # all wait for the files: torchrun ends everyone when the first process ends with a status
        return 0 if rt.rank or fits else 2


def start(arguments: list[str], launch: Launch, environ: dict[str, str]) -> int:
    """Read the settings and do what they say; returns the exit status. RunError for what the user can mend."""
    if arguments not in ([], ["--help"], ["--config"]):
        raise RunError(f"{' '.join(arguments)}: no such argument; settings are environment variables, see --help")
    if arguments == ["--help"]:
        say(help_text())
        return 0
    notes, artifact = read_environment(environ), None
    path = notes.explicit.get("eval_only")
    if path:
        if not os.path.isfile(path):
            raise RunError(f"EVAL_ONLY={path}: no such file; takes an artifact, final_model.int6.ptz")
        with open(path, "rb") as file:
            artifact = file.read()
        cfg = settings_to_score(notes, artifact, path)
    else:
        cfg = Settings(**notes.explicit)
    if arguments == ["--config"]:
        absent = {"not_here": notes.absent} if notes.absent else {}
        say(json.dumps(dataclasses.asdict(cfg) | {"aliases": notes.aliases} | absent, indent=1))
        for line in notes.absent:
            print(f"note: {line}", file=sys.stderr)
        if notes.ignored:
            print(f"note: ignored, no such setting: {', '.join(notes.ignored)}", file=sys.stderr)
        return 0
    rt = Runtime(cfg, launch)
    status = Run(fit_to_device(cfg, rt), notes, rt).execute(artifact)
    rt.close()  # not after an error: the others would see the connection close before they hear why
    return judge(rt.folder, launch) or status if cfg.audit else status


def judge(folder: str, launch: Launch) -> int:
    """With AUDIT=1, the status of the auditor that stands beside this script: it judges the run that has ended."""
    auditor = os.path.join(os.path.dirname(os.path.abspath(__file__)), "records", "audit.py")
    if launch.world > 1 or not os.path.exists(auditor):
        if launch.rank == 0:
            print(f"AUDIT=1: to be done by records/audit.py {folder}", flush=True)
        return 0
    return subprocess.run([sys.executable, auditor, folder]).returncode


def explain(error: Exception) -> str:
    """In one line what the user can do about an error of PyTorch's; empty for what is a defect of this script."""
    text, module = str(error), type(error).__module__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        memory = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return f"out of {memory}; lower MICRO_BATCH_TOKENS, EVAL_BATCH_TOKENS or, in test-time training, TTT_BATCH_SIZE"
    if "without overflow" in text:
        return "a learning rate, weight decay or initial value is too large for float32; lower it"
    if "pack_vnni2" in text:  # kernels for a CPU with avx512 were chosen, and then forbidden
        return "DTYPE=bf16: PyTorch has no attention in bf16 under ATEN_CPU_CAPABILITY; unset that, or take DTYPE=fp32"
    if module.startswith(("torch._dynamo", "torch._inductor", "triton")) or "C compiler" in text:
        said = next((line for line in reversed(text.splitlines()) if "rror" in line or "ompiler" in line), text)
        return f"COMPILE=1: the model could not be compiled ({said.strip()[:300]}); COMPILE=0 does without"
    return ""


def main() -> int:
    """Entry point: every expected failure becomes one line on stderr and exit status 1."""
    launch, status, message = Launch.read(dict(os.environ)), 1, ""
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot print is no reason to lose a run
        with suppress(OSError, ValueError):  # one that cannot be told so
            stream.reconfigure(errors="backslashreplace")
    if launch.world > 1:
        leave_when_told(launch)
    else:  # unwind, so that no temporary file stays
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = start(sys.argv[1:], launch, dict(os.environ))
    except RunError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename}: {e.strerror}" if e.filename else f"reading or writing failed: {e.strerror or e}"
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as e:  # of PyTorch, what the user can mend
        message = explain(e)
        if not message:
            if launch.world == 1:
                raise
            traceback.print_exc()  # an orderly end would wait for the others
    if message:
        tell(launch, message)
    if launch.world > 1:
        leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
