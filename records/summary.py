"""Print a run in a few lines: score before and after compression, bytes, and how small gzip and xz make the same text.

    python records/summary.py logs/<run>
    python records/summary.py logs/<run> --compare                      also says whether the score is as expected
    python records/summary.py logs/<run> --expect > records/smoke.json  makes this run's score the expected one
"""

import gzip
import hashlib
import json
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import caseops
from shards import read_pairs

import train_gpt as tg

EXPECTED = Path(__file__).resolve().parent / "smoke.json"
TOLERANCE = 0.01  # bits per byte: machines round otherwise, and training makes more of it
# settings that may differ from the expected run's: they say where things are, or do not change the score
FREE = {"run_id", "artifact_dir", "data_dir", "data_path", "tokenizer_path", "device", "audit", "save_model", "resume",
        "checkpoint_every", "train_log_every", "val_loss_every"}


def data_sha256(config: dict) -> str:
    """SHA-256 of all shards of a run, training before validation."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for path in tg.find_shards(config["data_path"], split):
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def expectation(result: dict) -> dict:
    """What records/smoke.json holds of a run: its score, and everything that the score depends on."""
    config = {name: value for name, value in result["config"].items() if name not in FREE}
    return {"val_bpb": round(result["val_bpb"], 4), "steps": result["steps"],
            "data_sha256": data_sha256(result["config"]), "config": config}


def comparison(result: dict, expected: dict) -> str:
    """One line that says whether the score is the expected one, or why the two cannot be compared."""
    config = result["config"]
    changed = [f"{name.upper()}={config.get(name)}" for name, value in expected["config"].items()
               if config.get(name) != value]
    figure = f"the expected {expected['val_bpb']:.4f}"
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"not compared with {figure}, which is of other settings: here {', '.join(changed[:3])}{more}"
    if data_sha256(config) != expected["data_sha256"]:
        return (f"not compared with {figure}: the text is another one, of other package versions or an older clone; "
                "remove data/local and data/datasets to make it anew")
    if result["steps"] != expected["steps"]:
        return (f"not compared with {figure}: MAX_WALLCLOCK_SECONDS={config['max_wallclock_seconds']:g} ended training "
                f"after {result['steps']} of {expected['steps']} steps")
    off = result["val_bpb"] - expected["val_bpb"]
    if abs(off) <= TOLERANCE:
        return f"as expected: {expected['val_bpb']:.4f} to within {TOLERANCE}; this installation computes right"
    return f"NOT AS EXPECTED: {off:+.4f} from {expected['val_bpb']:.4f}; more than {TOLERANCE} is no rounding"


def validation_text(config: dict) -> bytes:
    """UTF-8 of the validation documents before tokenization, one after another."""
    sp = sentencepiece.SentencePieceProcessor(model_file=config["tokenizer_path"])
    cfg = tg.Settings(data_path=config["data_path"], vocab_size=config["vocab_size"])
    paths = tg.shard_paths(cfg, "val")
    tokens = np.concatenate([tg.read_shard(path, cfg.vocab_size) for path in paths])
    tokens = caseops.Fusion(sp, read_pairs(paths)).split(tokens)[0]
    bos = sp.bos_id() if config.get("bos_id") is None else config["bos_id"]
    rule = caseops.rule_of(sp, tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == bos))
    texts = sp.decode([document[document != bos].tolist() for document in documents])
    if config["caseops_enabled"]:
        texts = [caseops.restore(text, False, rule) for text in texts]
    return "".join(texts).encode()


def summary(result: dict) -> str:
    """The lines about a run, from its result.json."""
    stages, config = result["stages"], result["config"]
    lines = [f"{result['steps']} steps on {result['tokens_seen']:,} tokens in {result['train_seconds']:.0f} s "
             f"({result['tok_per_s']:,.0f} tok/s) on {result['world_size']} x {result['device']}"]
    names = {"pre_quant": "trained model, full precision", "quantized": "after compression, reloaded",
             "sliding": f"the same, sliding window of {config['eval_stride']}",
             "ttt": f"the same, with test-time training ({config['ttt_mode']})"}
    lines += [f"  {stage['val_bpb']:.4f} bits per byte   {names.get(name, name)}" for name, stage in stages.items()]
    if result["val_bytes"] < 50e6:
        text = validation_text(config)
        for name, data in (("gzip -9", gzip.compress(text, 9)),
                           ("xz -9e", lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))):
            lines.append(f"  {8 * len(data) / len(text):.4f} bits per byte   {name} on the same {len(text):,} bytes")
    share = 100 * result["bytes_total"] / result["budget_bytes"]
    lines.append(f"artifact: model {result['model_bytes']:,} + code {result['code_bytes']:,} = "
                 f"{result['bytes_total']:,} bytes, {share:.1f} % of {result['budget_bytes']:,}"
                 f"{'' if result['fits'] else ': DOES NOT FIT'}")
    return "\n".join(lines)


def gpu_report(result: dict, log: str) -> str:
    """Lines about what a GPU did with its time: attention, compiling, speed, MFU, memory, host waits, seconds by stage.

    `log` is the run's train.log. MFU is count.py's model FLOPs over the dense bf16 peak that the maker gives, for the
    GPUs that count.py lists.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import count

    cfg = tg.Settings(**result["config"])
    lines = [line for line in log.splitlines() if line.startswith(("environment: ", "attention: not", "warm-up: "))]
    flops = count.model_flops(count.count_step(cfg, cfg.train_batch_tokens)) / cfg.train_batch_tokens
    device = count.device_called(result["device"])
    used = flops * result["tok_per_s"] / (result["world_size"] * device.flops) if device else None
    lines.append(f"speed: {result['tok_per_s']:,.0f} tok/s, {flops / 1e6:,.0f} MFLOP a token with all loops on, MFU "
                 f"{f'{used:.1%}' if used else 'unknown of this GPU'}")
    lines.append(f"memory: {result['peak_memory_bytes'] / 1e9:.1f} GB at most on one GPU")
    seconds = {"train": result["train_seconds"]} | {name: s["seconds"] for name, s in result["stages"].items()}
    lines.append("seconds: " + ", ".join(f"{name} {s:.1f}" for name, s in seconds.items()))
    return "\n".join(lines)


def main() -> int:
    folder, *options = sys.argv[1:] or [None]
    path = Path(folder, "result.json") if folder and options in ([], ["--expect"], ["--compare"]) else None
    try:
        if path is None:
            raise tg.RunError("usage: python records/summary.py <folder of a run> [--compare | --expect]")
        result = json.loads(path.read_text())
        for name in {"data_path", "tokenizer_path"} & {key.lower() for key in os.environ}:
            result["config"][name] = os.environ[name.upper()]  # the run's may be relative to another folder
        if options == ["--expect"]:
            print(json.dumps(expectation(result), indent=1))
            return 0
        print(summary(result))
        if result["device"] != "cpu":
            report = gpu_report(result, Path(folder, "train.log").read_text())
            Path(folder, "gpu_report.txt").write_text(report + "\n")
            print(f"{report}\nthe same in {folder}/gpu_report.txt")
        if options == ["--compare"]:
            print(comparison(result, json.loads(EXPECTED.read_text())))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, tg.RunError) as e:  # SentencePiece raises the last
        print(f"error: {path or ''}{': ' if path else ''}{e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
