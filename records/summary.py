"""A run in a few lines for a person: score before and after compression, bytes, and what gzip and xz make of the text.

    python records/summary.py logs/<run>
"""

import gzip
import json
import lzma
import sys
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg


def validation_text(config: dict) -> bytes:
    """UTF-8 of the validation documents as they were before tokenization, one after another."""
    sp = sentencepiece.SentencePieceProcessor(model_file=config["tokenizer_path"])
    cfg = tg.Settings(data_path=config["data_path"], vocab_size=config["vocab_size"])
    tokens = [t for path in tg.shard_paths(cfg, "val") for t in tg.read_shard(path, cfg.vocab_size).tolist()]
    documents, start = [], 0
    for end in [i for i, t in enumerate(tokens) if t == sp.bos_id() and i] + [len(tokens)]:
        documents.append(tokens[start:end])
        start = end
    raw = tg.case_restorer() if config["caseops_enabled"] else str
    return "".join(map(raw, sp.decode(documents))).encode()


def summary(result: dict) -> str:
    """The lines, from a run's result.json."""
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


def main() -> int:
    path = Path(sys.argv[1], "result.json") if len(sys.argv) == 2 else None
    try:
        if path is None:
            raise tg.RunError("usage: python records/summary.py <folder of a run>")
        print(summary(json.loads(path.read_text())))
    except (OSError, ValueError, KeyError, tg.RunError) as e:
        print(f"error: {path or ''}{': ' if path else ''}{e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
