#!/usr/bin/env python3
"""Measure loss against bytes for every way to quantize and to pack, on one trained model and the same tensors.

    SAVE_MODEL=1 ./run_smoke_1gpu.sh && python benchmarks/bytes.py logs/smoke

It takes the folder of a run with SAVE_MODEL=1 and that run's settings, and calibrates on the training text that comes
after it. The gap is the rise of the loss, in nats a token, over the trained model. KL, in nats a token too, is how far
the predictions moved from the trained model's, whatever token came; chance moves it less than the gap. `weighted` is
QUANT_ALLOCATION=auto: it fills the bytes of GPTQ + SDClip with its best packer, and then 85 and 70 % of them, or those
given, with codes rounded one by one and along a trellis (QUANT_TRELLIS=0 and 1). If lrzip is installed, it is measured
too, since submissions to the challenge use it: `lrzip -z -L 9` on the codes of each group, by rows or by columns.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plan
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg


def packed_sizes(cfg: tg.Settings, stored: dict[str, tg.Stored]) -> dict[str, int]:
    """Bytes of the whole artifact by packer. For packers other than `ans` this is the Brotli artifact with its codes
    packed by that packer, in the one of two orders that is smaller. Codes of a trellis are for `ans` alone.
    """
    settings = tg.artifact_settings(cfg)
    sizes = {"ans": len(tg.write_artifact(settings, stored, "ans"))}
    if any(item.chained for item in stored.values()):
        return sizes
    codes = [part for item in stored.values() for part in item.parts.values() if not part.is_floating_point()]
    orders = [[tg.to_stream(t if by_column else t.mT) for t in codes] for by_column in (False, True)]
    whole = len(tg.write_artifact(settings, stored, "brotli"))
    rest = whole - sum(len(tg.compress(stream, "brotli")) for stream in orders[1])
    packers = {"brotli": lambda data: len(tg.compress(data, "brotli")),
               "lzma": lambda data: len(tg.compress(data, "lzma"))}
    if shutil.which("lrzip"):
        packers["lrzip"] = lrzip
    for name, packer in packers.items():
        sizes[name] = rest + min(sum(packer(stream) for stream in order) for order in orders)
    return sizes


def lrzip(data: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "codes")
        path.write_bytes(data)
        subprocess.run(["lrzip", "-q", "-z", "-L", "9", str(path)], check=True, stderr=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL)
        return Path(folder, "codes.lrz").stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with SAVE_MODEL=1")
    parser.add_argument("--tokens", type=int, default=500_000, help="validation tokens to score (default: 500000)")
    parser.add_argument("--bytes", type=int, nargs="+", help="sizes of weighted artifacts, instead of shares")
    parser.add_argument("--json", type=plan.place, help="also write the figures to this file")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return measure(read_run(args.run), folder, args)
    except (tg.RunError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def read_run(run: Path) -> dict[str, Any]:
    """Its result.json. ValueError if that is none of this version of the script."""
    result = json.loads((run / "result.json").read_text())
    config = result.get("config", {}) if isinstance(result, dict) else {}
    unlike = sorted(set(config) ^ {f.name for f in dataclasses.fields(tg.Settings)})
    if unlike:
        raise ValueError(f"{run / 'result.json'}: not of this version of train_gpt.py, whose settings differ in "
                         f"{', '.join(unlike[:3])}{f' and {len(unlike) - 3} more' if unlike[3:] else ''}")
    return result


def measure(result: dict[str, Any], folder: str, args: argparse.Namespace) -> int:
    """Calibrate, then quantize, pack and score in every way, and print the table."""
    cfg = tg.Settings(**result["config"] | {"artifact_dir": folder, "quant_allocation": "auto",
                                            "gptq_reserve_seconds": 0.0, "ngram_tilt_enabled": False,
                                            "lqer_enabled": False, "qat_enabled": False})
    rt = tg.Runtime(cfg, tg.Launch())
    rt.open_logs(append=False)
    cfg = tg.fit_to_device(cfg, rt)
    val = tg.Validation.load(cfg, tg.read_tokenizer(cfg.tokenizer_path, cfg.vocab_size, cfg.bos_id), rt.device)
    val = val.over(val.tokens[: args.tokens], val.bytes[: args.tokens])
    model = tg.build_model(cfg, rt, tg.pick_attention(cfg, rt.device, rt.dtype).run, val.bos, pairs=val.pairs)
    model.load_state_dict(torch.load(args.run / "final_model.pt", map_location=rt.device, weights_only=True))
    original = copy.deepcopy(model)
    trained = {name: p.detach() for name, p in original.named_parameters()}
    clock, after = tg.Clock(rt, 0.0, 0.0), result["steps"] * cfg.train_batch_tokens // cfg.row_tokens
    clock.start()
    stats = tg.calibrate(cfg, rt, model, tg.Windows(cfg, rt, val.bos), after, clock)

    def divergence(ids: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        """KL (B, T) of the trained model's predictions to the ones at hand, 0 where there is no target."""
        p, q = (m(ids, **options).log_softmax(-1) for m in (original, model))
        return (p.exp() * (p - q)).sum(-1) * (targets != tg.IGNORE)

    def mean(forward: Callable) -> float:
        return tg.Evaluator(cfg, rt, model, forward, val).by_windows(cfg.eval_seq_len, "loss").val_loss

    base, rows = mean(model), []
    n = sum(g.view(trained[g.param]).numel() for g in tg.quant_groups(cfg))
    print(f"{sum(p.numel() for p in trained.values()):,} parameters, {stats.tokens:,} calibration tokens, "
          f"{len(val.tokens):,} validation tokens, loss {base:.5f}; bytes of the artifact by packer")

    def row(label: str, stored: dict[str, tg.Stored]) -> None:
        tg.load_weights(model, cfg, stored, "the table")
        sizes, gap, kl = packed_sizes(cfg, stored), mean(model) - base, mean(divergence)
        rows.append({"way": label, "gap": gap, "kl": kl, "bytes": sizes})
        packers = "  ".join(f"{name} {size:>9,}" for name, size in sorted(sizes.items()))
        print(f"{label:24} gap {gap:8.5f}  KL {kl:.5f}  {packers}  {8 * min(sizes.values()) / n:.3f} bits a weight",
              flush=True)

    apart = {role: torch.eye(h.size(1), device=h.device).expand_as(h) for role, h in stats.hessians.items()}
    row("nearest, SDClip", tg.quantize(cfg, rt, trained, tg.factorize_all(apart)))  # inputs that do not go together
    start = time.perf_counter()
    factors = tg.factorize_all(stats.hessians)
    plain = tg.quantize(cfg, rt, trained, factors)
    seconds = {"gptq": time.perf_counter() - start}
    row("GPTQ, SDClip", plain)
    most = min(rows[-1]["bytes"].values())
    row("GPTQ, SDClip, LQER", tg.quantize(dataclasses.replace(cfg, lqer_enabled=True), rt, trained, factors))
    for room in args.bytes or [int(share * most) for share in (1.0, 0.85, 0.7)]:
        for way, chained in (("GPTQ", False), ("trellis", True)):
            start = time.perf_counter()
            artifact = tg.fill_budget(dataclasses.replace(cfg, compressor="ans", quant_trellis=chained), rt, trained,
                                      stats, room)
            seconds[f"fill, {way}"] = time.perf_counter() - start
            weighted = tg.read_artifact(artifact, "the table")[1]
            row(f"{way}, weighted, {room / most:.0%}", weighted)
    start = time.perf_counter()
    again = tg.write_artifact(tg.artifact_settings(cfg), weighted, "ans")
    seconds["pack"] = time.perf_counter() - start
    start = time.perf_counter()
    tg.read_artifact(again, "the table")
    seconds["unpack"] = time.perf_counter() - start
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    if args.json:
        args.json.write_text(json.dumps({"base": base, "rows": rows, "seconds": seconds}, indent=1))
    rt.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
