"""What several test files share: models and text at small sizes, ranks as threads, comparisons."""

import random
import threading
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import shifted
from forked import PLAIN
from torch.overrides import TorchFunctionMode

import train_gpt as tg

BOS = 1
OFF = tg.read_environment(PLAIN).explicit

# ----- settings


# what models have in common whose losses and gradients are compared with the reference's
SIZES = {"model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 1.5, "rope_base": 50.0, "xsa_last_n": 3,
         "logit_softcap": 8.0, "vocab_size": 23}
ALL = {"num_loops": 2, "recur_blend": "ab", "parallel_mode": "crossed", "parallel_start_layer": 4,
       "bigram_vocab_size": 13, "bigram_dim": 6, "smear_gate_enabled": True, "ve_enabled": True, "ve_dim": 5,
       "ve_bigram_rows": 7, "ve_layers": "1,3,5", "sparse_attn_gate_enabled": True, "sparse_attn_gate_scale": 1.7,
       "rope_yarn": True, "key_offset": True}
TTT = {"num_layers": 3, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4, "xsa_last_n": 1,
       "loop_start": 1, "loop_end": 1, "eval_seq_len": 12, "eval_stride": 4, "eval_batch_tokens": 24,
       "eval_budget_seconds": 0.0, "ttt_mode": "lora", "ttt_batch_size": 3, "ttt_chunk_size": 4,
       "ttt_eval_seq_len": 10, "ttt_lora_rank": 3, "ttt_lora_alpha": 5.0, "ttt_lora_lr": 0.02, "ttt_lr": 0.05,
       "ttt_epochs": 2, "ttt_chunk_tokens": 16, "phased_ttt_prefix_docs": 5, "phased_ttt_num_phases": 2,
       "global_ttt_lr": 0.05, "global_ttt_chunk_tokens": 16, "ttt_bucket_window": 4}


def bare(**changes) -> tg.Settings:
    """Everything off that is on by default."""
    return tg.Settings(**OFF | changes)


def tiny(**changes) -> tg.Settings:
    """Six layers, of which 2 and 3 may loop; 4 query heads on 2 key/value heads; XSA on the last 3 layers."""
    values = {"num_layers": 6, "rope_dims": 6, "loop_start": 2, "loop_end": 3, "train_seq_len": 10, "gate_window": 7,
              "device": "cpu", "dtype": "fp32", "quant_min_weights": 0, "eval_stride": 0, "train_batch_tokens": 460,
              "micro_batch_tokens": 46}
    return bare(**SIZES | values | changes)


def tiny_ttt(**changes) -> tg.Settings:
    """Three layers, of which one may loop, and test-time training at rates that show."""
    return tiny(**TTT | changes)


def small_run(folder, **changes) -> tg.Settings:
    """Settings of a run into this folder, in fp32 on the CPU: six windows of 8 tokens a step, in passes of two."""
    values = {"model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 2.5, "rope_dims": 4, "train_seq_len": 8,
              "train_batch_tokens": 48, "micro_batch_tokens": 16, "eval_stride": 4, "device": "cpu", "dtype": "fp32",
              "artifact_dir": str(folder)}
    return bare(**values | changes)


# ----- models


def random_model(cfg: tg.Settings, seed: int = 0) -> tg.GPT:
    """A model none of whose parameters is 0, 1 or constant; a parameter's values depend on its name alone."""
    model = tg.GPT(cfg, bos=BOS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(shifted(seed + sum(name.encode()))))
            if name.endswith("_bank"):
                p.copy_(noise * 1.5 * p.size(-1) ** -0.5)
            elif name.endswith("_table") or name in ("tok_emb", "head", "skip_gate", "attn_gate", "smear_weight"):
                p.copy_(noise)
            else:
                p.copy_(0.8 + 0.4 * noise)
    return model


def redrawn(model: tg.GPT, seed: int | torch.Generator, value) -> tg.GPT:
    """The model, each parameter made value(name, parameter, noise); the noise is drawn for one after another."""
    generator = torch.Generator().manual_seed(shifted(seed)) if isinstance(seed, int) else seed
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(value(name, p, torch.randn(p.shape, generator=generator)))
    return model


class Products(TorchFunctionMode):
    """Records (input, weight) of every F.linear, and the names of all other matrix products."""

    OTHERS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "mv", "dot",
              "tensordot", "addbmm", "inner"}

    def __init__(self):
        super().__init__()
        self.linear, self.others = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if function is F.linear:
            self.linear.append((args[0].detach().clone(), args[1].detach().clone()))
        elif name in self.OTHERS:
            self.others.append(name)
        return function(*args, **(kwargs or {}))


# ----- what an artifact stores


def flat(stored: dict[str, tg.Stored]) -> dict[str, torch.Tensor]:
    """Every tensor of what an artifact stores, as "q.codes"; under the name alone if it is all that stands there."""
    return {name if item.form == "half" else f"{name}.{part}": tensor
            for name, item in stored.items() for part, tensor in item.parts.items()}


def empty_statistics(cfg: tg.Settings, model: tg.GPT, tokens: int = 0) -> tg.Statistics:
    """Statistics to which no text has been added; `tokens`: how many they are to be of."""
    return tg.Statistics.empty(cfg, model)._replace(tokens=tokens)


def empty_hessians(cfg: tg.Settings) -> dict[str, torch.Tensor]:
    return tg.Statistics.empty(cfg, tg.GPT(cfg)).hessians


def stored_weights(cfg: tg.Settings, model: tg.GPT) -> dict[str, tg.Stored]:
    """The weights as an artifact stores them, each rounded by itself: inputs without correlations."""
    hessians = {role: h + torch.eye(h.size(1)) for role, h in empty_hessians(cfg).items()}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return tg.quantize(cfg, FakeRuntime(), weights, tg.factorize_all(hessians))


# ----- text


def random_text(cfg: tg.Settings, rows: int, length: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, none of them BOS, and random targets."""
    generator = torch.Generator().manual_seed(shifted(seed))
    ids = torch.randint(2, cfg.vocab_size, (rows, length), generator=generator)
    return ids, torch.randint(0, cfg.vocab_size, (rows, length), generator=generator)


def packed_text(cfg: tg.Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 23 tokens: documents of 1 to 14 tokens, the second row not starting with BOS."""
    ids, targets = random_text(cfg, 2, 23)
    ids[0, [0, 3, 4, 18]] = BOS
    ids[1, [5, 6, 15, 22]] = BOS
    targets[0, 7] = targets[1, 0] = tg.IGNORE
    return ids, targets


def random_share(targets: torch.Tensor) -> torch.Tensor:
    """What each loss of these targets weighs in a sum whose gradient is compared."""
    return 0.1 + torch.rand(targets.shape, generator=torch.Generator().manual_seed(shifted(5)))


LENGTHS = [9, 1, 23, 4, 14, 8, 2, 17]


def stream(lengths: list[int], headless: bool = True, tail: bool = True, seed: int = 0) -> torch.Tensor:
    """Documents of so many tokens; the first without a BOS if `headless`, a last BOS without text if `tail`."""
    chance = random.Random(shifted(seed))
    tokens = [t for n in lengths for t in (BOS, *(chance.randrange(2, 23) for _ in range(n - 1)))]
    if headless:
        tokens[0] = 7
    return torch.tensor(tokens + [BOS] * tail, dtype=torch.int32)


def a_byte_each(tokens: torch.Tensor, docs: int = 1, bos: int = BOS, ngram=None) -> tg.Validation:
    """Validation text of these tokens, each of which is worth one byte."""
    return tg.Validation(tokens, torch.ones(len(tokens), dtype=torch.int32), docs, None, bos, ngram)


# ----- ranks


class FakeRuntime:
    """One of several ranks that run as threads of this process; what it logs stands in `said`."""

    def __init__(self, rank: int = 0, world: int = 1, meeting: SimpleNamespace | None = None):
        self.rank, self.world, self.meeting = rank, world, meeting
        self.device, self.said = torch.device("cpu"), []

    def progress(self, items, what, running=None):
        return items

    def log(self, message):
        self.said.append(message)

    note = log

    def sync(self):
        pass

    def meet(self, value) -> list:
        """What every rank brings, by rank."""
        if self.world == 1:
            return [value]
        self.meeting.parts[self.rank] = value
        self.meeting.barrier.wait()
        brought = [self.meeting.parts[rank] for rank in range(self.world)]
        self.meeting.barrier.wait()
        return brought

    def sum_(self, tensor: torch.Tensor, what: str = "") -> torch.Tensor:
        return tensor.copy_(sum(self.meet(tensor.clone())))

    def share_(self, tensor: torch.Tensor, what: str = "") -> torch.Tensor:
        return tensor.copy_(self.meet(tensor.clone())[0])

    def largest(self, value):
        return max(self.meet(value))


def on_ranks(world: int, work) -> list:
    """work(rt) on every rank at once; the results by rank."""
    meeting = SimpleNamespace(parts={}, barrier=threading.Barrier(world, timeout=300))
    results = [None] * world

    def run(rank):
        try:
            results[rank] = work(FakeRuntime(rank, world, meeting))
        except BaseException:
            meeting.barrier.abort()  # or the others would wait for this one
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results
    return results


# ----- comparisons


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a.detach().double() - b.detach().double()).abs().max())


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "",
                 scale: float | None = None) -> None:
    """Within tolerance of `scale`, which is the largest value expected unless it is given."""
    expected = expected.detach()
    scale = float(expected.abs().max()) if scale is None else scale
    assert got.shape == expected.shape and scale > 0, what
    difference = farthest(got, expected) / scale
    assert difference <= tolerance, f"{what}: {difference}"
