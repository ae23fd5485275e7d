#!/usr/bin/env python3
"""Measure what test-time training gains by document length, and how much more time it takes than scoring alone.

    EVAL_ONLY=logs/smoke/final_model.int6.ptz DATA_PATH=... TOKENIZER_PATH=... python benchmarks/ttt.py

The settings of train_gpt.py come from the environment. One process scores the artifact four times: by windows that do
not overlap, by document with adapters that do not learn, with LoRA, and phased. It prints a table; --json FILE writes
the figures to a file.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import plan
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg


def by_length(losses: torch.Tensor, val: tg.Validation, step: int) -> dict[int, list[float]]:
    """Length of documents in steps of `step` tokens -> documents, tokens, nats, bytes."""
    table, total = {}, torch.cat((torch.zeros(1), losses.double().cpu().cumsum(0)))
    before = torch.cat((torch.zeros(1, dtype=torch.int64), val.bytes.long().cumsum(0)))
    for a, b in tg.find_documents(val.tokens, val.bos):  # its targets are a + 1 .. b
        row = table.setdefault((b - a) // step, [0, 0, 0.0, 0])
        for i, value in enumerate((1, b - a, float(total[b + 1] - total[a + 1]), int(before[b + 1] - before[a + 1]))):
            row[i] += value
    return dict(sorted(table.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=int, default=1000, help="tokens of document length in a row of the table")
    parser.add_argument("--json", type=plan.place, help="also write the figures to this file")
    args = parser.parse_args()
    try:
        if args.step < 1:
            raise tg.RunError(f"--step {args.step}: takes a number of at least 1")
        notes = tg.read_environment(dict(os.environ))
        path = notes.explicit.get("eval_only", "")
        if not os.path.isfile(path):
            raise tg.RunError("EVAL_ONLY takes the artifact to score")
        artifact = Path(path).read_bytes()
        cfg = tg.settings_to_score(notes, artifact, path)
        with tempfile.TemporaryDirectory() as folder:
            return measure(dataclasses.replace(cfg, artifact_dir=folder), notes, artifact, args)
    except tg.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def measure(cfg: tg.Settings, notes: tg.Notes, artifact: bytes, args: argparse.Namespace) -> int:
    """Score the artifact in four ways and print the tables."""
    rt = tg.Runtime(cfg, tg.Launch())
    run = tg.Run(tg.fit_to_device(dataclasses.replace(cfg, ttt_mode="lora"), rt), notes, rt)
    stored, losses, scores = tg.read_artifact(artifact, "the artifact")[1], {}, {}
    ways = {"windows": {"ttt_mode": "none", "eval_stride": 0}, "no learning": {"ttt_lora_lr": 0.0}, "lora": {},
            "phased": {"ttt_mode": "phased"}}
    for name, changes in ways.items():
        cfg = dataclasses.replace(run.cfg, **changes)
        tg.load_weights(run.model, cfg, stored, "the artifact")
        if run.forward is not run.model and cfg.ttt_mode != "none":
            tg.Evaluator(cfg, rt, run.model, run.final_forward, tg.random_text(cfg, run.val)).warm_ttt()
        forward = run.forward if cfg.ttt_mode == "none" else run.final_forward
        evaluator = tg.Evaluator(cfg, rt, run.model, forward, run.val)
        scores[name] = evaluator.final()
        losses[name] = evaluator.scorer.charged()
    rt.close()
    print(f"\n{run.device}, {torch.get_num_threads()} threads; rank {cfg.ttt_lora_rank}, chunk {cfg.ttt_chunk_size}, "
          f"windows of {cfg.ttt_eval_seq_len}, {cfg.ttt_batch_size} documents at a time, lr {cfg.ttt_lora_lr:g}, "
          f"virtual layers {len(tg.virtual_layers(cfg, cfg.num_loops))}")
    for name, score in scores.items():
        print(f"{name:12} val_bpb {score.val_bpb:.6f}  {score.seconds:8.1f} s  "
              f"{1e6 * score.seconds / score.tokens:8.1f} us a token  "
              f"{score.seconds / scores['windows'].seconds:6.1f} x windows")
    tables = {name: by_length(values, run.val, args.step) for name, values in losses.items()}
    print(f"\n{'tokens a document':>18} {'documents':>10} {'tokens':>9}" + "".join(f"{name:>13}" for name in ways))
    for row, (docs, tokens, _, n_bytes) in tables["lora"].items():
        bpb = [tables[name][row][2] / (math.log(2) * max(n_bytes, 1)) for name in ways]
        print(f"{row * args.step:>8} .. {(row + 1) * args.step:>6} {docs:>10} {tokens:>9}"
              + "".join(f"{value:>13.4f}" for value in bpb))
    if args.json:
        report = {"device": run.device, "settings": dataclasses.asdict(run.cfg), "by_length": tables,
                  "scores": {name: score._asdict() for name, score in scores.items()}}
        tg.atomic_write(str(args.json), json.dumps(report, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
