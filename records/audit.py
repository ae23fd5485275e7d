"""Judge a finished run from outside: recompute its score, and check on the script that made it that the score is legal.

    python records/audit.py RUN                                               RUN: the folder that the run wrote
    torchrun --standalone --nproc_per_node=N records/audit.py RUN --full      also repeats the whole evaluation

The script is the counted one, RUN/train_gpt.packed.py. The settings are those in RUN/result.json; DATA_PATH,
TOKENIZER_PATH and DEVICE in the environment take precedence. The auditor only runs the script, through its start(), on
text in files. A verdict rests on what the auditor does itself: it reads the text and finds where documents start,
counts the bytes, adds up the losses and compares the distributions. It watches two places in the script:

  GPT.forward   what the model is asked and answers; the auditor asks again for the distribution behind the answer
  Scorer.add    which loss is recorded for which token; the script's Scorer gets it too, and its result is judged

The auditor writes RUN/audit.json: for each check {ok, detail}, or null where there is nothing to compare with; the
SHA-256 of script and artifact; the seconds. The exit status is 0, 1 with one line if there is nothing to judge, or 3 if
a check failed. docs/proof.md says what each check does and what the auditor cannot see.

The script runs in this process. A script with faults is judged; one that is written to deceive the auditor has to be
read by a person.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import time
import zipimport
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import caseops
from overlap import ALLOWED, find_overlap
from shards import Parser, atomic_write, file_sha256, find_shards, one_line, read_pairs, read_shard, write_shard

CODE, ARTIFACT, RESULT, VERDICT = "train_gpt.packed.py", "final_model.int6.ptz", "result.json", "audit.json"
CHECKS = ("bytes", "single_pass", "normalized", "causal", "no_overlap", "score", "training")
CAUSAL_TOLERANCE, NORMAL_TOLERANCE = 1e-5, 1e-4  # of losses in nats and of probabilities
SUM_TOLERANCE, SCORE_TOLERANCE = 1e-6, 2e-4  # of one run's sums, relative; of bits per byte on two machines
LOST_TOLERANCE = 1e-5  # of bytes, relative: published sidecars count a raw text that its tokens do not give back
CONFIG = ("data_path", "tokenizer_path", "device", "dtype", "fused", "train_seq_len", "eval_only", "eval_seq_len",
          "eval_stages", "eval_stride", "ttt_mode")  # settings that are read here
HEDGE_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # boosts that HEDGE_ENABLED mixes, in units of TOKEN_BOOST
HINT_KINDS = 10  # of hints whose boosts it weighs apart, by how often their probability halves 1


class AuditError(Exception):
    """There is nothing to judge. main() prints the message as one line and exits with status 1."""


class Check(NamedTuple):
    """One line of the audit."""

    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED'}: {self.detail}"


# ----------------------------------------------------------------------------------------------------------------------
# Text: documents, bytes, shards


class Text:
    """The tokens of some shards, and what they stand for."""

    def __init__(self, tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor, bos: int, caseops_: bool,
                 fusion: caseops.Fusion | None = None, rule: Any = None):
        """tokens (n,) uint16; `bos` is the id that starts a document, -1 for none. `fusion`: of ids that stand for two
        tokens; None: there are none. `rule`: by which CaseOps marked the text; None: the one that it shows.
        """
        self.tokens, self.sp, self.bos, self.caseops = tokens.astype(np.int64), tokenizer, bos, caseops_
        self.fusion, self.rule = fusion or caseops.Fusion(tokenizer), rule
        if caseops_ and rule is None:
            self.rule = caseops.rule_of(tokenizer, self.fusion.split(self.tokens)[0])

    def replaced(self, tokens: np.ndarray) -> "Text":
        return Text(tokens, self.sp, self.bos, self.caseops, self.fusion, self.rule)

    def documents(self) -> list[tuple[int, int]]:
        """(first token, one after the last) of each document, from the token that starts it to the next such token."""
        starts = np.flatnonzero(self.tokens == self.bos)
        return list(pairwise(np.unique([0, *starts.tolist(), len(self.tokens)]).tolist()))

    def words(self, a: int, b: int) -> tuple[list[int], np.ndarray]:
        """The tokens of a document without the token that starts it, which stands for no text. Pairs are split; the
        array says where among these tokens each token of the document is, or begins.
        """
        tokens, places = self.fusion.split(self.tokens[a + (self.tokens[a] == self.bos) : b])
        return tokens.tolist(), places

    def raw_bytes(self, texts: list[str], words: list[list[int]]) -> list[int]:
        """UTF-8 bytes of decoded documents. Where a character is cut, each of its byte pieces counts as one byte."""
        counts = []
        for text, ids in zip(texts, words):
            count = len((caseops.restore(text, False, self.rule) if self.caseops else text).encode())
            if "\ufffd" in text:  # SentencePiece writes it, three bytes, for each byte that belongs to no character
                count -= 2 * lone_bytes(self.sp, ids)
            counts.append(count)
        return counts

    def count_bytes(self, spans: list[tuple[int, int]]) -> int:
        """Bytes of these documents as SentencePiece decodes them. The first token of the text is no target and is left
        out.
        """
        total = 0
        for low in range(0, len(spans), 256):
            words = [self.words(a, b)[0] for a, b in spans[low : low + 256]]
            total += sum(self.raw_bytes(self.sp.decode(words), words))
        if spans and spans[0][0] == 0 and self.tokens[0] != self.bos:
            first = [self.words(0, 1)[0]]
            total -= self.raw_bytes(self.sp.decode(first), first)[0]
        return total

    def sidecar(self) -> np.ndarray:
        """(n,) uint16: the bytes of raw text for which each token of a CaseOps text stands."""
        charges = np.zeros(len(self.tokens), np.int64)
        for a, b in self.documents():
            ids, places = self.words(a, b)
            if ids:
                counts = caseops.charges(self.sp, ids, self.rule)
                charges[b - len(places) : b] = np.add.reduceat(counts, places)
        return charges.astype(np.uint16)

    def write(self, folder: Path) -> None:
        """Write the text as validation shards, with a new sidecar if it is CaseOps text."""
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(folder / "fineweb_val_000000.bin", self.tokens.astype(np.uint16), self.fusion.pairs)
        if self.caseops:
            write_shard(folder / "fineweb_val_bytes_000000.bin", self.sidecar())

    def altered(self) -> np.ndarray:
        """(n,) int64: every token replaced by another one. Tokens that start documents stay, so that documents stay
        where they are. A replacement is no byte piece, which could leave half a character, and no piece that stands for
        no text.
        """
        sp, chance = self.sp, np.random.default_rng(0)
        no_text = (sp.is_control, sp.is_unknown, sp.is_unused, sp.is_byte)
        usual = np.array([i for i in range(sp.vocab_size()) if i != self.bos
                          and (i in self.fusion.ids or not any(f(i) for f in no_text))])
        picks = chance.integers(0, len(usual) - 1, len(self.tokens))
        other = usual[picks]
        other = np.where(other == self.tokens, usual[picks + 1], other)
        return np.where(self.tokens == self.bos, self.tokens, other)


def lone_bytes(sp: sentencepiece.SentencePieceProcessor, ids: list[int]) -> int:
    """How many byte pieces among these tokens belong to no whole character."""
    text, raw = "", b""
    for i in [*ids, None]:
        if i is not None and sp.is_byte(i):
            raw += bytes([int(sp.id_to_piece(i)[3:5], 16)])  # "<0xE2>"
        else:
            text, raw = text + raw.decode(errors="surrogateescape"), b""
    return sum("\udc80" <= c <= "\udcff" for c in text)


# ----------------------------------------------------------------------------------------------------------------------
# The script, run with an auditor in its way


class Seen(NamedTuple):
    """The losses that one evaluation of a text recorded, over all processes; arrays are (n,), by position in the text.
    """

    losses: Tensor  # float64, nats, after the n-gram tilt if there is one; index 0 is no target
    hints: Tensor  # int64: one more than the token that the tilt made likelier; 0 for none
    times: Tensor  # int64: how often each was charged
    row: Tensor  # int64: a number for the row of the forward pass that gave it
    other: int  # losses that were charged to a place where the text has another token than the model was asked for
    back: int  # charged before the token to its left in the same document
    predictions: Tensor  # (watched, V): the distribution of each token to watch
    gaps: Tensor  # how far a charged loss is from -log p: its sum, count and sum of absolute values, then the largest

    @property
    def nats(self) -> float:
        return float(self.losses[1:].sum())

    def faults(self) -> list[str]:
        """What is wrong with the targets that were scored and with their order."""
        times = self.times[1:]
        wrong = (times != 1).nonzero().flatten()
        told = [(len(wrong), f"{int((times == 0).sum())} targets never scored, {int((times > 1).sum())} more than once "
                             f"(first: token {int(wrong[0]) + 1 if len(wrong) else 0})"),
                (self.other, f"{self.other} losses are not of the token that stands there"),
                (self.back, f"{self.back} targets scored before the one before them in their document")]
        return [fault for count, fault in told if count]


class Witness:
    """Stands before the model. It sees what the model is asked and can ask the model again in the same state."""

    def __init__(self, text: Text, forward, watched: list[int], verify: bool, boosts: list[float]):
        """`boosts`: what the n-gram tilt adds to the logits of hints; empty without a tilt."""
        self.text, self.forward, self.watched, self.verify, self.boosts = text, forward, watched, verify, boosts
        self.stream, self.chance = torch.from_numpy(text.tokens), torch.Generator().manual_seed(0)
        self.call = self.model = None

    def __call__(self, model, ids: Tensor, targets: Tensor | None = None, *rest, **options) -> Tensor:
        if targets is not None:  # with a tilt, hints stand behind the targets
            wanted, *hints = targets if targets.ndim == 3 else [targets]
            self.model, self.call = model, (ids, wanted, hints[0] if hints else None, rest, options)
        return self.forward(model, ids, targets, *rest, **options)

    @torch.no_grad()
    def ask(self, positions: Tensor, losses: Tensor, hint_losses: Tensor | None, predictions: Tensor) -> Tensor:
        """Save the distribution of each watched target that is scored here. Return how far three kinds of losses are
        from -log p: those recorded, those of hints, and those of random other tokens at the same places. If all of them
        agree, p adds up to 1.
        """
        ids, targets, hints, rest, options = self.call
        watched = torch.tensor(self.watched, device=positions.device)
        which, row, column = (watched[:, None, None] == positions).nonzero(as_tuple=True)
        if not self.verify and not len(which):
            return losses.new_zeros(0)
        log_p, scored = self.forward(self.model, ids, None, *rest, **options).float().log_softmax(-1), positions > 0
        predictions[which.cpu()] = log_p[row, column].exp().cpu()
        place = positions.clamp(max=len(self.stream) - 1).cpu()
        gaps, tokens = [], self.stream[place].to(targets)  # what stands there, whatever was asked for
        if hint_losses is not None and self.verify:
            hinted = scored & (hints >= 0)
            gaps.append(hint_losses[hinted].float() + log_p[hinted].gather(-1, hints[hinted][:, None])[:, 0])
        for n in range(4 if self.verify else 0):
            if n:
                random = torch.randint(log_p.size(-1), targets.shape, generator=self.chance).to(targets)
                tokens = torch.where(scored, random, targets)
                losses = self.forward(self.model, ids, tokens, *rest, **options)
            gaps.append(losses[scored].float() + log_p[scored].gather(-1, tokens[scored][:, None])[:, 0])
        return torch.cat(gaps) if gaps else losses.new_zeros(0)


class Recorder:
    """Stands in the place of the script's Scorer. It records what it is given, passes it on to that Scorer and returns
    the Scorer's answers.
    """

    def __init__(self, script: ModuleType, witness: Witness, asked: bool, inner: Any):
        """`asked`: the witness sees the calls of the model, which it cannot with a compiled model."""
        self.script, self.witness, self.asked, self.inner, self.calls, self.rows = script, witness, asked, inner, 0, 0
        n, self.other, self.seen = len(witness.stream), 0, None
        self.losses, self.hint_losses = torch.zeros(2, n)
        self.times, self.turn, self.row, self.hints = (torch.zeros(n, dtype=torch.int64) for _ in range(4))
        self.predictions, self.gaps = torch.zeros(len(witness.watched), witness.text.sp.vocab_size()), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def add(self, positions: Tensor, losses: Tensor, *hint_losses: Tensor) -> None:
        """Record losses in nats, with their positions in the text (0 for padding), both (rows, length); with a tilt
        also the losses of the hints.
        """
        place, charged = positions.detach().flatten().cpu(), losses.detach().flatten().float().cpu()
        row = self.rows + torch.arange(len(place)) // positions.size(-1) + 1
        real = (place > 0) & (place < len(self.losses))
        self.other += int((place >= len(self.losses)).sum())
        place, self.calls, self.rows = place[real], self.calls + 1, int(row[-1])
        self.losses.index_add_(0, place, charged[real])
        self.times.index_add_(0, place, torch.ones_like(place))
        self.turn[place], self.row[place] = self.calls, row[real]
        for charged in hint_losses:
            self.hint_losses.index_add_(0, place, charged.detach().flatten().float().cpu()[real])
        if self.asked:
            asked = self.witness.call[1] if self.witness.call else positions.new_zeros(0)
            if asked.shape != positions.shape:
                self.other += len(place)
            else:
                self.other += int((asked.flatten().cpu()[real] != self.witness.stream[place]).sum())
                hint = None
                if hint_losses:
                    hint, hints = hint_losses[0].detach(), self.witness.call[2]
                    self.hints.index_add_(0, place, (hints + 1).clamp(min=0).flatten().cpu()[real])
                self.gaps.append(self.witness.ask(positions, losses.detach(), hint, self.predictions).cpu())
        self.inner.add(positions, losses, *hint_losses)

    def finish(self) -> Any:
        """The score that the script's own Scorer computes. If that one refuses, the auditor's own sums are the score,
        so that the other checks can go on.
        """
        back = (self.turn[2:] < self.turn[1:-1]) & (self.turn[2:] > 0)
        back &= (self.witness.stream != self.witness.text.bos)[1:-1]  # the target after it is of the same document
        gaps = torch.cat([torch.zeros(0), *self.gaps]).double()
        rank = dist.get_rank() if dist.is_initialized() else 0
        counts = total(torch.tensor([self.other, int(back.sum())]))
        sums = total(torch.stack((gaps.sum(), torch.tensor(float(len(gaps))).double(), gaps.abs().sum())))
        most = total(gaps.abs().max() if len(gaps) else torch.zeros((), dtype=torch.float64), dist.ReduceOp.MAX)
        losses, hints, predictions = total(self.losses).double(), total(self.hints), total(self.predictions)
        if self.witness.boosts:
            tilt(self.witness, losses, total(self.hint_losses).double(), hints, predictions)
        self.seen = Seen(losses, hints, total(self.times), total(self.row + (self.row > 0) * (rank << 40)),
                         *counts.tolist(), predictions, torch.cat((sums, most[None])))
        try:
            return self.inner.finish()
        except self.script.RunError:
            nats, tokens = self.seen.nats, len(self.losses) - 1
            n_bytes = self.witness.text.count_bytes(self.witness.text.documents())
            return self.script.Score(nats / tokens, nats / (math.log(2) * max(n_bytes, 1)), tokens, n_bytes, 0.0)


def tilt(witness: Witness, losses: Tensor, hint_losses: Tensor, hints: Tensor, predictions: Tensor) -> None:
    """The n-gram tilt, in place: losses (n,) float64 and the watched distributions (watched, V), target by target.

    A boost b makes of p the distribution p(x) e^(b [x is the hint]) / (1 + p(hint) (e^b - 1)). Boosts are mixed by
    weights in proportion to exp(-what each has cost on the targets before whose hints had a p within the same factor of
    two, from 2^-9 down all). Where the model was not asked which token a hint is, it is right if it costs what the
    target costs.
    """
    boosts = np.array(witness.boosts)
    so_far, watched = np.zeros((HINT_KINDS, len(boosts))), {t: i for i, t in enumerate(witness.watched)}
    for t in (hint_losses != 0).nonzero().flatten().tolist():
        costs = so_far[min(HINT_KINDS - 1, int(hint_losses[t] / math.log(2)))]
        weights = np.exp(costs.min() - costs)
        weights /= weights.sum()
        lowered = 1 / (1 + math.exp(-hint_losses[t]) * np.expm1(boosts))  # by boost: the factor of what is no hint
        raised = lowered * np.exp(boosts)
        if t in watched:
            p, hint = predictions[watched[t]], int(hints[t]) - 1
            p_hint = float(p[hint])
            p *= (weights * lowered).sum()
            p[hint] = p_hint * (weights * raised).sum()
        right = hints[t] == witness.stream[t] + 1 if hints[t] else abs(float(hint_losses[t] - losses[t])) < 1e-6
        chances = math.exp(-losses[t]) * (raised if right else lowered)
        losses[t] = -math.log((weights * chances).sum())
        costs -= np.log(chances)


def total(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
    """The tensor reduced over all processes; it has to be on the CPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor, how)
    return tensor


class Evaluation(NamedTuple):
    """The result that the script wrote for a text, and what the auditor saw of it."""

    said: dict[str, Any] | None  # its result.json; None on processes that write none
    stages: list[Seen]
    model: Any  # None where this process had nothing to score
    script: ModuleType


class Subject:
    """The run that is judged: its files, script, settings and text. AuditError if something is missing."""

    def __init__(self, run: Path, environ: dict[str, str]):
        self.run, self.result = run, read_result(run)
        self.config = dict(self.result["config"])
        self.config |= {name: environ[name.upper()] for name in ("data_path", "tokenizer_path", "device")
                        if environ.get(name.upper())}
        self.code, self.artifact = run / CODE, run / ARTIFACT
        if not self.artifact.exists() and self.config.get("eval_only"):
            self.artifact = Path(self.config["eval_only"])
        self.hashes, self.lost = {}, 0  # bytes that sidecars count beyond those of the decoded documents
        for path, key in ((self.code, "code_sha256"), (self.artifact, "model_sha256")):
            if not path.is_file():
                raise AuditError(f"{path}: no such file")
            self.hashes[key] = file_sha256(path)
            if self.hashes[key] != self.result[key]:
                raise AuditError(f"{path}: is not the file of {run / RESULT} ({key} differs)")
        self.text = self.read_text()
        self.train_shards = find_shards(Path(self.config["data_path"]), "train")
        self.script = Script(self.code)
        self.rank, self.world = (int(environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.on_gpu = torch.cuda.is_available() and self.config["device"] != "cpu"
        if self.world > 1:  # of the auditor's; the script finds it
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.on_gpu else "gloo", timeout=timedelta(minutes=30))

    def read_text(self) -> Text:
        """The validation text of the run."""
        folder, path, c = Path(self.config["data_path"]), Path(self.config["tokenizer_path"]), self.config
        paths = find_shards(folder, "val")
        if not paths:
            raise AuditError(f"DATA_PATH={folder}: no fineweb_val_*.bin there")
        if not path.is_file():
            raise AuditError(f"TOKENIZER_PATH={path}: no such file")
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise AuditError(f"TOKENIZER_PATH={path}: not a SentencePiece model") from None
        if sp.vocab_size() != c["vocab_size"]:
            raise AuditError(f"TOKENIZER_PATH={path}: has {sp.vocab_size()} pieces, the run has {c['vocab_size']}")
        tokens = np.concatenate([read_shard(p, c["vocab_size"]) for p in paths])
        if len(tokens) < 2:
            raise AuditError(f"DATA_PATH={folder}: the validation shards hold {len(tokens)} tokens, nothing to score")
        fusion = caseops.Fusion(sp, read_pairs(paths))
        return Text(tokens, sp, sp.bos_id() if c["bos_id"] is None else c["bos_id"], c["caseops_enabled"], fusion)

    def charged_bytes(self, decoded: int) -> int:
        """The bytes to divide by: those of the `decoded` documents. But the published CaseOps sidecars count the raw
        text, which the tokens do not give back where the tokenizer normalizes. There it is what the sidecars count, if
        that is nearly the same.
        """
        paths = find_shards(Path(self.config["data_path"]), "val_bytes")
        if self.text.rule is not caseops.PUBLISHED or "\ufb01" in self.text.sp.normalize("\ufb01") or not paths:
            return decoded
        charged = int(np.concatenate([read_shard(path) for path in paths])[1:].sum(dtype=np.int64))
        near = abs(charged - decoded) <= LOST_TOLERANCE * decoded
        self.lost = charged - decoded if near else 0
        return charged if near else decoded

    def log(self) -> str:
        """The run's train.log; empty if there is none."""
        path = self.run / "train.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def environment(self, **changes: Any) -> dict[str, str]:
        """The run's settings with these changes, as environment variables."""
        changes = {"save_model": False, "resume": False, "checkpoint_every": 0} | changes
        values = {k: v for k, v in (self.config | changes).items() if v not in (None, "")}  # these are the defaults
        return {k.upper(): str(int(v) if isinstance(v, bool) else v) for k, v in values.items()}

    def evaluate(self, text: Text, watched: list[int] = (), verify: bool = False, data_path: str = "",
                 **changes: Any) -> Evaluation:
        """Run the script's whole evaluation of the artifact, all stages, on this text or on the shards in `data_path`.
        """
        script, recorders, asked = self.script.fresh(), [], not data_path
        steps = HEDGE_STEPS if self.config.get("hedge_enabled") else (1.0,)
        boosts = [self.config["token_boost"] * step for step in steps] if self.config.get("ngram_tilt_enabled") else []
        witness = Witness(text, script.GPT.forward, list(watched), verify, boosts)
        kept = script.Scorer, script.GPT.forward, dist.init_process_group, dist.destroy_process_group

        def scorer(*arguments: Any, **options: Any) -> Recorder:
            recorders.append(Recorder(script, witness, asked, kept[0](*arguments, **options)))
            return recorders[-1]

        with tempfile.TemporaryDirectory() as folder:
            if not data_path:
                text.write(Path(folder, "text"))
            environ = self.environment(eval_only=str(self.artifact), data_path=data_path or f"{folder}/text",
                                       artifact_dir=f"{folder}/run", **changes)
            script.Scorer = scorer
            if asked:
                script.GPT.forward = lambda model, *inputs, **options: witness(model, *inputs, **options)
            dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None
            try:
                self.start(script, script.Launch.read(dict(os.environ)), environ)
            finally:
                _, script.GPT.forward, dist.init_process_group, dist.destroy_process_group = kept
            path = Path(folder, "run", RESULT)
            said = json.loads(path.read_text()) if path.exists() else None
        return Evaluation(said, [r.seen for r in recorders if r.seen], witness.model, script)

    def start(self, script: ModuleType, launch: Any, environ: dict[str, str]) -> None:
        """Run the script without its output."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                script.start([], launch, environ)
        except script.RunError as e:
            raise AuditError(f"{self.code}: {e}") from None

    def train(self, text: Text, folder: Path) -> str:
        """SHA-256 of the artifact of a short training on the CPU, in one process, with this as validation text."""
        text.write(folder / "data")
        length = self.config["train_seq_len"]
        tokens = read_shard(self.train_shards[0])[: 64 * length + 1]
        write_shard(folder / "data/fineweb_train_000000.bin", np.array(tokens), read_pairs(self.train_shards[:1]))
        script = self.script.fresh()
        self.start(script, script.Launch(), self.environment(
            eval_only="", data_path=str(folder / "data"), artifact_dir=str(folder / "run"), device="cpu", dtype="fp32",
            compile="0", attention="auto", fused=False, iterations=2, max_wallclock_seconds=0.0,
            loop_schedule="", enable_looping_at=0.0, warmup_steps=0, train_batch_tokens=2 * length,
            micro_batch_tokens=length, gptq_calibration_batches=1, gptq_reserve_seconds=None, ttt_mode="none",
            eval_stride=0, eval_batch_tokens=self.config["eval_seq_len"], val_loss_every=0))
        return file_sha256(folder / "run" / ARTIFACT)


def read_result(run: Path) -> dict[str, Any]:
    path = run / RESULT
    try:
        result = json.loads(path.read_bytes())
        missing = [key for key in ("config", "stages", "val_bpb", "val_bytes", "code_sha256", "model_sha256")
                   if key not in result]
        missing = missing or [f"config.{key}" for key in CONFIG if key not in result["config"]]
        missing = missing or [f"stages.{name}.{key}" for name, stage in result["stages"].items()
                              for key in ("val_loss", "val_bpb", "tokens", "bytes") if key not in stage]
    except OSError as e:
        raise AuditError(f"{path}: {e.strerror}: not the folder of a finished run") from None
    except (ValueError, TypeError, AttributeError):
        raise AuditError(f"{path}: not JSON of a result") from None
    if missing:
        raise AuditError(f"{path}: has no {missing[0]}: not the result of this train_gpt.py")
    return result


class Script:
    """The module train_gpt in a packed script."""

    def __init__(self, path: Path):
        try:
            self.spec = zipimport.zipimporter(str(path)).find_spec("train_gpt")
        except zipimport.ZipImportError:
            self.spec = None
        if self.spec is None:
            raise AuditError(f"{path}: not a packed script")
        self.code = self.spec.loader.get_code("train_gpt")
        fresh = self.fresh()
        for name in ("start", "Launch", "Scorer", "Score", "GPT", "Bounds", "RunError"):
            if not hasattr(fresh, name):
                raise AuditError(f"{path}: has no {name}: not a script that this can judge")

    def fresh(self) -> ModuleType:
        """Import the module anew, so that nothing is left of what it did before."""
        module = sys.modules["train_gpt"] = importlib.util.module_from_spec(self.spec)
        exec(self.code, module.__dict__)
        return module


# ----------------------------------------------------------------------------------------------------------------------
# A short text that has every kind of edge


class Sample(NamedTuple):
    """Beginnings of documents from all over the validation text, and how to evaluate them."""

    text: Text
    starts: list[int]  # of its documents
    watched: list[int]  # targets to look at, but for the edges of windows
    changes: dict[str, Any]  # settings: what counts documents and tokens, scaled to the text
    windowed: bool  # scored by windows of the stream, not by documents

    @property
    def half(self) -> int:
        return self.starts[len(self.starts) // 2]


def draw_sample(subject: Subject) -> Sample:
    """The first tokens of documents, cut so that documents end anywhere in a chunk and a phase ends in the middle of
    them.
    """
    c, text = subject.config, subject.text
    chunk, length, stride = c["ttt_chunk_size"], c["eval_seq_len"], c["eval_stride"] or c["eval_seq_len"]
    batch, windowed = min(c["ttt_batch_size"], 8), c["ttt_mode"] in ("none", "chunk")
    documents = text.documents()
    longest, count = max(documents, key=lambda d: d[1] - d[0]), max(2 * batch, 12)
    documents = documents[:: max(1, len(documents) // count)][:count]
    sizes = [2 * chunk + 2, chunk, chunk + 1, 3, 2 * chunk, chunk - 1]
    if windowed:
        sizes = [max(4, -(-(length + 6 * stride + 3) // len(documents)))]
    spans = [(a, min(b, a + max(1, sizes[i % len(sizes)]))) for i, (a, b) in enumerate(documents)]
    if windowed and c["varlen_enabled"]:  # else windows would hold every document whole
        spans[len(spans) // 3] = longest[0], min(longest[1], longest[0] + length + 3 * stride + 1)
    tokens = np.concatenate([text.tokens[a : whole_end(text, a, b)] for a, b in spans])
    short = text.replaced(tokens)
    starts = [a for a, _ in short.documents()]
    half, long = starts[len(starts) // 2], starts[(len(starts) - 1) // 6 * 6]
    watched = {1, 2, half, half + 1, len(tokens) - 1}
    hints = {}
    if c.get("ngram_tilt_enabled"):  # so short that a short text has hints
        order = c["token_order"]  # a number in runs from before there were lists
        hints = {"token_order": "3,2" if "," in str(order) else type(order)(2), "token_threshold": 0.2}
    if not windowed:
        watched |= {chunk, long + chunk, long + chunk + 1}
    return Sample(short, starts, sorted(t for t in watched if 1 <= t < len(tokens)), {
        "compile": "0", "eval_budget_seconds": 0.0, "eval_batch_tokens": min(c["eval_batch_tokens"], 8 * length),
        "ttt_batch_size": batch, "ttt_bucket_window": min(c["ttt_bucket_window"], 2 * batch),
        "ttt_chunk_tokens": min(c["ttt_chunk_tokens"], 2 * stride),  # two windows
        "phased_ttt_prefix_docs": max(1, len(starts) // 2),
        "phased_ttt_num_phases": min(c["phased_ttt_num_phases"], 2),
        "global_ttt_chunk_tokens": min(c["global_ttt_chunk_tokens"], half // 3 + 1)} | hints, windowed)


def whole_end(text: Text, a: int, b: int) -> int:
    """Where to end the tokens from a: at b, or as little before b as leaves no character cut."""
    while (b > a + 1 and b < len(text.tokens) and text.sp.is_byte(int(text.tokens[b]))
           and text.tokens[b] not in text.fusion.ids):
        b -= 1
    return b


def edges(seen: Seen) -> list[int]:
    """Targets on both sides of the first four edges between rows of forward passes."""
    first = (seen.row[2:] != seen.row[1:-1]).nonzero().flatten()[:4] + 2
    return sorted({*(first - 1).tolist(), *first.tolist()})


def hinted(seen: Seen) -> list[int]:
    """A few targets that have a hint."""
    places = seen.hints.nonzero().flatten().tolist()
    return places[:: max(1, len(places) // 4)][:5]


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def farthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def check_bytes(subject: Subject, sample: Sample, plain: Evaluation, n_bytes: int) -> Check:
    """Compare the bytes by which the run divides with those of the decoded documents; `n_bytes` are those of the whole
    text.
    """
    counted = subject.result["stages"] | {"val_bytes": {"bytes": subject.result["val_bytes"]}}
    faults = [f"{name} has {stage['bytes']}" for name, stage in counted.items() if stage["bytes"] != n_bytes]
    here = sample.text.count_bytes(sample.text.documents())
    faults += [f"{name} has {stage['bytes']} on {here} bytes of documents that are cut short"
               for name, stage in (plain.said or {"stages": {}})["stages"].items() if stage["bytes"] != here]
    detail = f"{n_bytes} bytes in {len(subject.text.documents())} decoded documents"
    if subject.lost:
        detail += f", {subject.lost:+} by sidecars that count what the published tokenizer normalizes"
    return Check(not faults, "; ".join([detail, *faults]))


def check_order(subject: Subject, plain: Evaluation) -> Check:
    """Every target is scored once in every stage, with the token that stands there, from left to right in its document.
    """
    names = stage_names(subject.config)
    faults = [f"{name}: {fault}" for name, seen in zip(names, plain.stages) for fault in seen.faults()]
    if len(plain.stages) != len(names):
        faults.append(f"{len(plain.stages)} evaluations were seen, expected {', '.join(names)}")
    n = len(plain.stages[0].losses) - 1 if plain.stages else 0
    return Check(not faults, "; ".join(faults) or f"{n} targets of the short text scored once in each of "
                 f"{len(plain.stages)} stages, left to right in documents")


def check_normalized(subject: Subject, base: Evaluation) -> Check:
    gaps = torch.stack([seen.gaps for seen in base.stages])
    (signed, count, _), most = gaps[:, :3].sum(0).tolist(), float(gaps[:, 3].max())
    mean = signed / max(count, 1)
    rounding = subject.config["fused"] and subject.config["dtype"] != "fp32"  # elsewhere than in the plain model
    fine = abs(mean) <= 1e-3 and most < 0.5 if rounding else most <= NORMAL_TOLERANCE
    return Check(count > 0 and fine, f"{count:.0f} losses are -log p of distributions that add up to 1: log of the sum "
                 f"at most {most:.1e}, on average {mean:.1e}")


def check_causal(subject: Subject, sample: Sample, watched: list[int], plain: Evaluation, base: Evaluation) -> Check:
    """For each watched target t, evaluate the short text again with t and all tokens after it replaced. All targets
    before t must have the same losses as before, and the distribution p_t must be the same. Where documents are scored
    by themselves, other documents must not matter either. Where two equal runs differ, four times that difference is
    allowed and reported.

    On a GPU, backward passes add up in another order each time. What has learned from them differs by roundings of
    bf16, in some runs and not in others, and a small leak would be no larger. So there the same is asked twice: in the
    run's own form without learning, and with learning in fp32, where such roundings are below the tolerance.
    """
    if not subject.on_gpu or subject.config["ttt_mode"] == "none":
        return check_cuts(subject, sample, watched, plain, base)
    checks = {}
    for form, changes in {"without learning": {"ttt_lora_lr": 0.0, "ttt_lr": 0.0, "global_ttt_lr": 0.0},
                          "with it, in fp32": {"dtype": "fp32", "attention": "auto", "fused": False}}.items():
        asked = sample._replace(changes=sample.changes | changes)
        plain, base = (subject.evaluate(sample.text, watched, **asked.changes) for _ in range(2))
        checks[form] = check_cuts(subject, asked, watched, plain, base)
    return Check(all(check.ok for check in checks.values()),
                 "; ".join(f"{form}: {check.detail}" for form, check in checks.items()))


def check_cuts(subject: Subject, sample: Sample, watched: list[int], plain: Evaluation, base: Evaluation) -> Check:
    """check_causal() with the settings of `sample`; `plain` and `base` are two evaluations with them."""
    noise = max(farthest(a.losses, b.losses) for a, b in zip(plain.stages, base.stages))
    names = stage_names(subject.config)
    altered, place, worst = sample.text.altered(), np.arange(len(sample.text.tokens)), (0.0, "")
    for i, t in enumerate(watched):
        text = sample.text.replaced(np.where(place < t, sample.text.tokens, altered))
        for name, new, old in zip(names, subject.evaluate(text, [t], **sample.changes).stages, base.stages):
            worst = max(worst, (farthest(new.losses[1:t], old.losses[1:t]), f"a target before {t}, {name}"),
                        (farthest(new.predictions[0], old.predictions[i]), f"the prediction of target {t}, {name}"))
    unseen = [t for t, p in zip(watched, base.stages[-1].predictions) if not p.sum() > 0.99]
    if sample.half:
        worst = max(worst, other_documents(subject, sample, np.where(place < sample.half, altered, sample.text.tokens),
                                           base, names))
    return Check(not unseen and noise < 1e-3 and worst[0] <= CAUSAL_TOLERANCE + 4 * noise,
                 f"{f'targets {unseen} were never predicted; ' if unseen else ''}{len(watched)} cuts in {len(place)} "
                 f"tokens of {len(sample.starts)} documents: what follows a cut changes what is before it by "
                 f"{worst[0]:.1e}{f' ({worst[1]})' if worst[0] else ''}; equal runs differ by {noise:.1e}")


def stage_names(config: dict[str, Any]) -> list[str]:
    """The stages of an evaluation with these settings, in order."""
    names = ["quantized", *["sliding"] * (config["eval_stride"] > 0), *["ttt"] * (config["ttt_mode"] != "none")]
    return names[-1:] if config["eval_stages"] == "final" else names


def other_documents(subject: Subject, sample: Sample, tokens: np.ndarray, base: Evaluation, names: list[str]
                    ) -> tuple[float, str]:
    """How far one half of the documents changes the other half, if `tokens` replaces the first half: where documents
    are scored by themselves, and in one forward pass that is told where documents start. What learns from earlier
    documents by design is off meanwhile.
    """
    c, half, model, bos = subject.config, sample.half, base.model, sample.text.bos
    alone = [c["ttt_mode"] == "lora" if name == "ttt" else c["varlen_enabled"] for name in names]
    worst = (0.0, "")
    if any(alone):
        off = {name: False for name in ("ngram_tilt_enabled", "ttt_warm_start_a") if c.get(name)}
        old = subject.evaluate(sample.text, **sample.changes | off).stages if off else base.stages
        new = subject.evaluate(sample.text.replaced(tokens), **sample.changes | off).stages
        worst = max((farthest(a.losses[half + 1 :], b.losses[half + 1 :]), f"another document, {name}")
                    for name, a, b, by_itself in zip(names, new, old, alone) if by_itself)
    if model is None or sample.text.tokens[half] != bos:
        return worst
    device, low = next(model.parameters()).device, max(0, half - 64)
    ids = torch.tensor(np.stack((sample.text.tokens, tokens))[:, low : half + 64], device=device)
    with torch.no_grad():
        answers = [model(row[None], bounds=base.script.Bounds.find(row[None], bos, len(row)), loops=c["num_loops"])[
            0, half - low :].float().softmax(-1) for row in ids]
    return max(worst, (farthest(*answers), "a document in a row with another"))


def check_overlap(subject: Subject) -> Check | None:
    """Find the validation documents that are also in the training shards."""
    text, paths = subject.text, subject.train_shards
    docs = int((text.tokens == text.bos).sum())
    if not paths or not docs:
        return None
    if not any((read_shard(path) == text.bos).any() for path in paths):
        return Check(False, f"no training shard holds token {text.bos}, by which documents would be found")
    mine = range(subject.rank, len(paths), subject.world)
    found = total(torch.from_numpy(find_overlap(text.tokens.astype(np.uint16), paths, mine, text.bos)).int())
    numbers = found.nonzero().flatten().tolist()
    listed = f", the first of them {numbers[:20]}" if numbers else ""
    return Check(len(numbers) <= ALLOWED * docs, f"{len(numbers)} of {docs} validation documents also start one in "
                 f"{len(paths)} training shards{listed}")


def check_score(subject: Subject, plain: Evaluation, n_bytes: int, full: bool) -> Check:
    """Compare the scores that the script writes with the auditor's own sums, and result.json with itself and the text.
    """
    faults, result = differing(plain, plain.said, len(plain.stages[0].losses) - 1, None), subject.result
    targets = len(subject.text.tokens) - 1
    docs = int((subject.text.tokens == subject.text.bos).sum())
    for name, stage in result["stages"].items():
        bits = stage["val_loss"] * targets / (math.log(2) * n_bytes)
        if stage["tokens"] != targets:
            faults.append(f"{name} has {stage['tokens']} targets, the text {targets}")
        if not math.isclose(stage["val_bpb"], bits, rel_tol=SUM_TOLERANCE):
            faults.append(f"{name} has val_bpb {stage['val_bpb']:.8f}, its val_loss makes {bits:.8f}")
    last = list(result["stages"].values())[-1]
    for name, value in (("val_bpb", last["val_bpb"]), ("val_loss", last["val_loss"]), ("val_docs", docs),
                        ("val_tokens", targets), ("model_bytes", subject.artifact.stat().st_size),
                        ("code_bytes", subject.code.stat().st_size),
                        ("bytes_total", subject.artifact.stat().st_size + subject.code.stat().st_size)):
        faults += [] if result[name] == value else [f"{name} is {result[name]}, expected {value}"]
    compared = f"sums of {len(plain.stages)} stages on the short text, {RESULT} with itself and the text"
    if full:
        again = subject.evaluate(subject.text, data_path=subject.config["data_path"], eval_budget_seconds=0)
        faults += differing(again, again.said, targets, n_bytes)
        faults += [fault for seen in again.stages for fault in seen.faults()]
        ours = again.stages[-1].nats / (math.log(2) * n_bytes)
        if not same_score(ours, result["val_bpb"], subject.log()):
            faults.append(f"the run's val_bpb is {result['val_bpb']:.8f}, here the losses make {ours:.8f}")
        compared += f", and the whole evaluation again: {ours:.8f}, {abs(ours - result['val_bpb']):.1e} from the run's"
    return Check(not faults, "; ".join(faults) or f"compared: {compared}")


def same_score(here: float, said: float, log: str) -> bool:
    """Whether a run may say `said` where the same evaluation, without a limit of time, gives `here`. One whose time ran
    out, as its log tells, has learned from less of the text: it may say more.
    """
    cut = "tokens scored and not trained on" in log
    return here - said <= SCORE_TOLERANCE if cut else abs(here - said) <= SCORE_TOLERANCE


def differing(evaluation: Evaluation, said: dict[str, Any] | None, targets: int, n_bytes: int | None) -> list[str]:
    """The stages whose written loss differs from the recorded losses."""
    stages = said["stages"] if said else {}
    faults = [] if not said or len(stages) == len(evaluation.stages) else ["not every stage was seen"]
    for (name, stage), seen in zip(stages.items(), evaluation.stages):
        loss = seen.nats / targets
        if not math.isclose(stage["val_loss"], loss, rel_tol=SUM_TOLERANCE) or stage["tokens"] != targets:
            faults.append(f"{name} is written as {stage['val_loss']:.8f} of {stage['tokens']} targets, the losses "
                          f"charged make {loss:.8f} of {targets}")
        bits = seen.nats / (math.log(2) * (n_bytes or stage["bytes"]))
        if not math.isclose(stage["val_bpb"], bits, rel_tol=SUM_TOLERANCE):
            faults.append(f"{name} is written as {stage['val_bpb']:.8f} bits a byte, the losses make {bits:.8f}")
    if said and stages and [said["val_loss"], said["val_bpb"]] != [stage["val_loss"], stage["val_bpb"]]:
        faults.append("the score that is written is not that of the last stage")
    return faults


def check_training(subject: Subject, sample: Sample) -> Check | None:
    """Two short trainings that differ in the validation text alone must give the same artifact, byte for byte."""
    if not subject.train_shards or subject.rank:
        return None
    with tempfile.TemporaryDirectory() as folder:
        texts = sample.text, sample.text.replaced(sample.text.altered())
        hashes = [subject.train(text, Path(folder, name)) for text, name in zip(texts, ("one", "two"))]
    same = hashes[0] == hashes[1]
    return Check(same, f"two trainings of two steps with other validation texts give "
                 f"{'one artifact' if same else 'two artifacts'} ({', '.join(h[:8] for h in dict.fromkeys(hashes))})")


def judge(subject: Subject, full: bool = False, names: tuple[str, ...] = CHECKS) -> dict[str, Check | None]:
    """Run these checks in order."""
    sample, spans = draw_sample(subject), subject.text.documents()
    share = [len(spans) * r // subject.world for r in (subject.rank, subject.rank + 1)]
    n_bytes = subject.charged_bytes(int(total(torch.tensor(subject.text.count_bytes(spans[slice(*share)])))))
    plain = subject.evaluate(sample.text, **sample.changes)
    if not plain.stages:
        return {"single_pass": Check(False, "nothing was scored")}
    watched = sorted({*sample.watched, *hinted(plain.stages[-1]),
                      *(edges(plain.stages[-1]) if sample.windowed else [])})
    base = subject.evaluate(sample.text, watched, verify=True, **sample.changes)
    checks = {"bytes": lambda: check_bytes(subject, sample, plain, n_bytes),
              "single_pass": lambda: check_order(subject, plain),
              "normalized": lambda: check_normalized(subject, base),
              "causal": lambda: check_causal(subject, sample, watched, plain, base),
              "no_overlap": lambda: check_overlap(subject),
              "score": lambda: check_score(subject, plain, n_bytes, full),
              "training": lambda: check_training(subject, sample)}
    return {name: checks[name]() for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def audit(run: Path, full: bool) -> int:
    """Judge the run and write audit.json; returns the exit status of this process: 0, or 3 on the first one."""
    start = time.perf_counter()
    subject = Subject(run, dict(os.environ))
    checks = judge(subject, full)
    ok = all(check.ok for check in checks.values() if check)
    if subject.rank == 0:
        for name, check in checks.items():
            print(f"audit {name}: {check or 'nothing to compare with'}")
        seconds = time.perf_counter() - start
        verdict = {"ok": ok, "checks": {name: check and check._asdict() for name, check in checks.items()},
                   **subject.hashes, "full": full, "world_size": subject.world, "seconds": seconds,
                   "finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        with atomic_write(run / VERDICT) as file:
            file.write(json.dumps(verdict, indent=1, allow_nan=False).encode())
        print(f"audit took {seconds:.1f}s; {'passed' if ok else 'FAILED'}; in {run / VERDICT}")
    total(torch.zeros(1))  # all wait for the file: torchrun ends everyone when the first process ends with a status
    return 0 if ok or subject.rank else 3


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description="Judge a finished run from outside; writes RUN/audit.json.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that the run wrote")
    parser.add_argument("--full", action="store_true", help="also repeat the whole evaluation and compare its score")
    try:
        args = parser.parse_args(arguments)
        return audit(args.run, args.full)
    except (AuditError, ValueError, OSError) as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {one_line(e)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
