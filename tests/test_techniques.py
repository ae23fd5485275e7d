"""Every model technique against the float64 reference (reference.py), and its absence when it is off.

All weights are random, none at its initial value, unless a test is about initial values.
"""

import itertools

import pytest
import torch
from helpers import ALL, BOS, assert_close, bare, flat, packed_text, random_model, random_share, stored_weights, tiny
from reference import Reference, by_piece, document_spans, int32, sizes_of_gradients

import train_gpt as tg


def same_document(ids: torch.Tensor, row: int, start: int) -> list[int]:
    """The tokens before `start` in its document, as far as the row has them."""
    tokens = ids[row].tolist()
    first = next((t for t in range(start, -1, -1) if tokens[t] == BOS), 0)
    return tokens[first:start]


def assert_equals_reference(cfg: tg.Settings, max_len: int | None, loops: int, pairs=()) -> None:
    """Losses and all gradients, packed in pieces of max_len or (None) by rows."""
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    if pairs:
        model.fuse(pairs)
    bounds = tg.Bounds.find(ids, BOS, max_len) if max_len else None
    share = random_share(targets)
    losses = model(ids, targets, bounds, loops=loops)
    (losses * share).sum().backward()
    reference = Reference(cfg, model, loops, max_len or ids.size(1))
    pieces = document_spans(ids, max_len) if max_len else [(row, 0, ids.size(1)) for row in range(len(ids))]
    expected, gradients, sizes = by_piece(pieces, lambda row, a, b: reference.losses(
        ids[row, a:b].tolist(), targets[row, a:b].tolist(), same_document(ids, row, a)), share, reference.p)
    assert_close(losses, expected, 2e-5)
    assert expected.std() > 0.3
    for name, parameter in model.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_close(parameter.grad, gradients[name], 5e-5, name, sizes[name])


LOOPS = {"num_loops": 2}
TECHNIQUES = {
    "plain": {},
    "recurrence": LOOPS,
    "recurrence-ungated-skips": LOOPS | {"skip_gates_enabled": False, "loop_start": 1},
    "recurrence-alpha": LOOPS | {"recur_blend": "alpha"},
    "recurrence-ab": LOOPS | {"recur_blend": "ab"},
    "recurrence-gate": LOOPS | {"recur_blend": "gate"},
    "recurrence-of-all-layers": {"num_loops": 1, "loop_start": 0, "loop_end": 5, "recur_blend": "ab"},
    "gptj": {"parallel_start_layer": 3},
    "gptj-in-the-loop": LOOPS | {"parallel_start_layer": 3, "recur_blend": "ab"},
    "lanes": {"parallel_mode": "lanes", "parallel_start_layer": 3},
    "lanes-after-loops": LOOPS | {"parallel_mode": "lanes", "parallel_start_layer": 4, "recur_blend": "alpha"},
    "crossed": {"parallel_mode": "crossed", "parallel_start_layer": 3},
    "crossed-attn-after-loops": LOOPS | {"parallel_mode": "crossed", "parallel_start_layer": 4, "recur_blend": "gate",
                                         "parallel_final_lane": "attn"},
    "crossed-mlp-after-loops": LOOPS | {"parallel_mode": "crossed", "parallel_start_layer": 4,
                                        "parallel_final_lane": "mlp", "skip_gates_enabled": False},
    "bigram": {"bigram_vocab_size": 13, "bigram_dim": 6},
    "bigram-of-two-buckets": {"bigram_vocab_size": 2, "bigram_dim": 40},
    "bigram-signs": {"bigram_vocab_size": 13, "bigram_dim": 6, "bigram_signs": True},
    "smear-input": {"smear_gate_enabled": True},
    "smear-vector": {"smear_gate_enabled": True, "smear_gate_mode": "vector"},
    "value-embedding": {"ve_enabled": True, "ve_dim": 5, "ve_layers": "1,5"},
    "value-embedding-in-the-loop": LOOPS | {"ve_enabled": True, "ve_dim": 40, "ve_layers": "4,3"},
    "value-embeddings": {"ve_enabled": True, "ve_dim": 0, "ve_layers": "5,1,2"},
    "value-embeddings-of-bigrams": {"ve_enabled": True, "ve_dim": 0, "ve_layers": "4,1", "ve_bigram_rows": 13},
    "value-embedding-of-bigrams": {"ve_enabled": True, "ve_dim": 5, "ve_layers": "4,1", "ve_bigram_rows": 2},
    "value-embeddings-in-the-loop": LOOPS | {"ve_enabled": True, "ve_dim": 0, "num_kv_heads": 1},
    "sparse-gate": {"sparse_attn_gate_enabled": True, "sparse_attn_gate_scale": 0.6},
    "gated": {"gated_attn_enabled": True},
    "out-gate": {"attn_out_gate_enabled": True, "gate_window": 32},
    "yarn": {"rope_yarn": True},
    "key-offset": {"key_offset": True},
    "key-offset-of-all-dims": LOOPS | {"key_offset": True, "rope_dims": 0, "num_kv_heads": 1},
    "untied": {"tie_embeddings": False},
    "factorised": {"embedding_dim": 9},
    "factorised-wide": {"embedding_dim": 41},
    "factorised-untied": {"embedding_dim": 9, "tie_embeddings": False},
    "no-xsa": {"xsa_last_n": 0, "num_kv_heads": 1},
    "all-with-crossed": ALL,
    "all-with-lanes": ALL | {"parallel_mode": "lanes", "recur_blend": "alpha", "smear_gate_mode": "vector",
                             "sparse_attn_gate_enabled": False, "gated_attn_enabled": True, "embedding_dim": 11},
    "all-with-gptj": ALL | {"parallel_mode": "gptj", "parallel_start_layer": 2, "recur_blend": "gate",
                            "sparse_attn_gate_enabled": False, "attn_out_gate_enabled": True,
                            "tie_embeddings": False, "skip_gates_enabled": False, "num_kv_heads": 1},
}


@pytest.mark.parametrize("max_len", [14, None], ids=["packed", "rows"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_losses_and_gradients_equal_the_reference(name, max_len):
    cfg = tiny(**TECHNIQUES[name])
    assert_equals_reference(cfg, max_len, cfg.num_loops)


@pytest.mark.parametrize("loops", [0, 1])
@pytest.mark.parametrize("blend", ["none", "alpha", "ab", "gate"])
def test_fewer_loops_than_the_model_has_equal_the_reference(blend, loops):
    assert_equals_reference(tiny(num_loops=2, recur_blend=blend), 14, loops)


@pytest.mark.parametrize("max_len", [3, 5, 10, 23])
def test_pieces_of_any_length_equal_the_reference(max_len):
    assert_equals_reference(tiny(**ALL), max_len, 2)


def test_evaluation_loops_as_often_as_the_model_has():
    cfg = tiny(num_loops=2)
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    losses = [model(ids, targets, loops=loops) for loops in (None, 2, 1, 0)]
    assert torch.equal(losses[0], losses[1])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(losses[1:], 2))


# ----- ids that stand for two tokens


def some_pairs(cfg: tg.Settings) -> list[list[int]]:
    """Pairs under ids of packed_text(); two of them end a document, and BOS follows."""
    ids, _ = packed_text(cfg)
    fused = sorted({int(ids[0, 17]), int(ids[1, 4]), int(ids[0, 8]), int(ids[1, 18])} - {BOS})
    others = [token for token in range(2, cfg.vocab_size) if token not in fused]
    return [[token, others[i], others[-1 - i % 2]] for i, token in enumerate(fused)]


@pytest.mark.parametrize("max_len", [14, None], ids=["packed", "rows"])
@pytest.mark.parametrize("name", ["plain", "smear-input", "smear-vector", "bigram", "all-with-crossed",
                                  "all-with-lanes"])
def test_fused_pairs_equal_the_reference(name, max_len):
    cfg = tiny(**TECHNIQUES[name])
    assert_equals_reference(cfg, max_len, cfg.num_loops, some_pairs(cfg))


@pytest.mark.parametrize("changes", [{}, {"embedding_dim": 9}, {"tie_embeddings": False}])
def test_rows_of_fused_pairs_begin_as_a_mixture(rt, changes):
    cfg = tiny(**changes)
    pairs = some_pairs(cfg)
    plain, empty, fused = (tg.build_model(cfg, rt, tg.attend_sdpa, BOS, pairs=p) for p in ((), [], pairs))
    table = plain.tok_emb.detach().double()
    norms = [float((row * row).sum()) ** 0.5 for row in table]
    for token, piece, marker in pairs:
        row = 0.4 * table[piece] + 0.6 * table[marker]
        row = row * (sum(norms) / len(norms)) / float((row * row).sum()) ** 0.5
        assert_close(fused.tok_emb[token], row, 1e-6)
    others = [token for token in range(cfg.vocab_size) if token not in {pair[0] for pair in pairs}]
    assert torch.equal(fused.tok_emb[others], plain.tok_emb[others])
    for name, p in plain.named_parameters():
        assert torch.equal(dict(empty.named_parameters())[name], p)
        assert name == "tok_emb" or torch.equal(dict(fused.named_parameters())[name], p), name
    assert plain.is_pair is None and empty.is_pair is None
    assert fused.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("mode", ["input", "vector"])
def test_the_smear_gate_is_off_after_a_fused_pair(mode):
    """There the inputs are to the bit those of a model without the gate; elsewhere those of a model without pairs."""
    cfg, (ids, _) = tiny(smear_gate_enabled=True, smear_gate_mode=mode), packed_text(tiny())
    plain, pairs = random_model(cfg), some_pairs(cfg)
    fused, without = random_model(cfg), random_model(tiny())
    fused.fuse(pairs)
    for model in (plain, without):
        model.load_state_dict({k: v for k, v in fused.state_dict().items() if k in model.state_dict()})
    with torch.no_grad():
        smeared, got, bare = (model.embed(ids, tg.NO_HOOKS)[0] for model in (plain, fused, without))
    after = torch.zeros_like(ids, dtype=torch.bool)
    for row, t in itertools.product(range(2), range(1, 23)):
        after[row, t] = int(ids[row, t]) != BOS and int(ids[row, t - 1]) in {pair[0] for pair in pairs}
    assert 2 <= after.sum() < 20
    assert torch.equal(got[after], bare[after]) and torch.equal(got[~after], smeared[~after])
    assert ((smeared - bare)[after].abs().amax(-1) > 1e-3).sum() > 1


# ----- depth recurrence


@pytest.mark.parametrize("layers, start, end, loops, order, skips", [
    (11, 3, 5, 2, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10], 8),
    (11, 4, 5, 1, [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10], 6),
    (11, 3, 5, 0, list(range(11)), 5),
    (9, 4, 4, 3, [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8], 6),
    (3, 0, 2, 1, [0, 1, 2, 0, 1, 2], 3),
    (2, 1, 1, 1, [0, 1, 1], 1),
])
def test_virtual_order_by_hand(layers, start, end, loops, order, skips):
    cfg = tiny(num_layers=layers, loop_start=start, loop_end=end, num_loops=loops)
    virtual = tg.virtual_layers(cfg, loops)
    assert [layer for layer, _ in virtual] == order
    for n, (layer, visit) in enumerate(virtual):
        assert visit == order[:n].count(layer)
    assert tg.virtual_layers(cfg, 0) == [(layer, 0) for layer in range(layers)]
    assert tg.GPT(cfg, bos=BOS).skip_weight.shape == tg.GPT(cfg, bos=BOS).skip_gate.shape == (skips, 32)


def test_encoder_and_decoder_of_the_looped_order():
    """[0,1,2,3,4,5,3,4 | 5,3,4,5,6,7,8,9,10]: what is pushed when, and which skip weight joins it back in."""
    cfg = tiny(num_layers=11, loop_start=3, loop_end=5, num_loops=2)
    model, events = random_model(cfg), []
    run_layer = model.layer

    def spy(x, lane, skip, last, params, *rest):
        own = params.weights
        if skip is not None:
            joins = (i for i, w in enumerate(model.skip_weight) if torch.equal(w, own["skip_weight"]))
            events.append(("join", next(joins), skip))
        layer = next(i for i, q in enumerate(model.qo_bank) if torch.equal(q, own["q"]))
        events.append(("block", layer, run_layer(x, lane, skip, last, params, *rest)[0]))
        return events[-1][2], None

    model.layer = spy
    model(packed_text(cfg)[0])
    outputs = [y for kind, _, y in events if kind == "block"]
    joined = [(next(n for n, y in enumerate(outputs) if torch.equal(y, skip)), i) for kind, i, skip in events
              if kind == "join"]
    assert joined == [(7 - i, i) for i in range(8)]
    assert [(kind, which) for kind, which, _ in events] == [
        *(("block", layer) for layer in (0, 1, 2, 3, 4, 5, 3, 4)),
        *(event for i, layer in enumerate((5, 3, 4, 5, 6, 7, 8, 9)) for event in (("join", i), ("block", layer))),
        ("block", 10)]


def test_each_visit_has_its_own_site():
    """(physical layer, visit) is what adapters are keyed by."""
    cfg = tiny(num_loops=2)
    model, (ids, _), seen = random_model(cfg), packed_text(cfg), []
    model(ids, hooks=tg.Hooks(fake_quant=lambda w, site: seen.append(site) or w))
    for role in ("q", "k", "v", "o", "up", "down"):
        expected = [(0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2), (4, 0), (5, 0)]
        assert [(site.layer, site.visit) for site in seen if site.role == role] == expected


# ----- the hash


@pytest.mark.parametrize("buckets", [2, 13, 3072, 65535])
def test_bigram_buckets_by_hand(buckets):
    """Products of the larger ids leave int32."""
    tokens = [0, 65535, 65535, 1, 59141, 59140, 78976 % 65536, 40000, 3, 65535]
    starts = torch.tensor([[t in (0, 4) for t in range(10)]])
    got = tg.bigram_bucket(torch.tensor([tokens]), starts, buckets)[0].tolist()
    for t, bucket in enumerate(got):
        pair = int32(int32(36313 * tokens[t]) ^ int32(27191 * tokens[t - 1]))
        assert bucket == (buckets - 1 if t in (0, 4) else pair % (buckets - 1))
    assert buckets == 2 or len(set(got)) > 3


def test_signs_of_bigrams_are_balanced_and_go_apart():
    """As fair coins: as many of both, and two rows or two columns agree in half of the places."""
    signs = tg.sign_table(112).float()
    assert signs.shape == (8192, 112) and set(signs.unique().tolist()) == {1.0, -1.0}
    assert abs(float(signs.mean())) < 4 / (8192 * 112) ** 0.5
    for table in (signs, signs.mT):
        agree = table @ table.mT / table.size(1) - torch.eye(len(table))
        assert float(agree.abs().max()) < 6.5 / table.size(1) ** 0.5
        assert float(agree.std()) == pytest.approx(table.size(1) ** -0.5, rel=0.05)


def test_document_starts():
    ids = torch.tensor([[1, 5, 6, 7, 1, 1, 8], [9, 9, 9, 9, 9, 1, 9]])
    assert tg.document_starts(ids, BOS).int().tolist() == [[1, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1, 0]]


# ----- off is absent


def everything(cfg: tg.Settings, model: tg.GPT, bounds: bool) -> dict[str, torch.Tensor]:
    """Losses and gradients on the packed text."""
    ids, targets = packed_text(cfg)
    losses = model(ids, targets, tg.Bounds.find(ids, BOS, 14) if bounds else None)
    losses.mean().backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result | {"losses": losses.detach()}


def stored_bytes(cfg: tg.Settings, model: tg.GPT) -> dict[str, int]:
    """Name and size of all that the artifact would hold."""
    return {name: t.numel() * t.element_size() for name, t in flat(stored_weights(cfg, model)).items()}


GATE = {"attn_gate.levels", "attn_gate.scales"}  # as stored
TECHNIQUES_OFF = {  # what may be set while it is off; what turns it on; parameters that adds; how they are stored
    "recurrence": ({"num_loops": 0, "loop_start": 0, "loop_end": 4, "recur_blend": "ab", "recur_alpha_init": 0.3,
                    "recur_a_init": 0.4, "recur_b_init": 0.5}, LOOPS | {"recur_blend": "ab"}, {"recur_blend"},
                   {"recur_blend"}),
    "recurrence-alpha": ({"num_loops": 0, "recur_blend": "alpha", "recur_alpha_init": 0.3, "loop_end": 99},
                         LOOPS | {"recur_blend": "alpha"}, {"recur_blend"}, {"recur_blend"}),
    "recurrence-gate": ({"num_loops": 0, "recur_blend": "gate", "loop_start": 5, "loop_end": 2},
                        LOOPS | {"recur_blend": "gate"}, {"recur_blend"}, {"recur_blend"}),
    "gptj": ({"parallel_final_lane": "attn"}, {"parallel_start_layer": 3}, set(), set()),
    "lanes": ({"parallel_mode": "lanes"}, {"parallel_mode": "lanes", "parallel_start_layer": 3}, {"lane_mix"},
              {"lane_mix"}),
    "crossed": ({"parallel_mode": "crossed", "parallel_final_lane": "mlp", "parallel_start_layer": 6},
                {"parallel_mode": "crossed", "parallel_start_layer": 3}, {"lane_keep", "lane_write"},
                {"lane_keep", "lane_write"}),
    "bigram": ({"bigram_dim": 9}, {"bigram_vocab_size": 13}, {"bigram_table", "bigram_bank", "bigram_scale"},
               {"bigram_table.codes", "bigram_table.scales", "bigram.codes", "bigram.scales", "bigram_scale"}),
    "bigram-signs": ({"bigram_signs": True}, {"bigram_vocab_size": 13, "bigram_signs": True},
                     {"bigram_table", "bigram_bank", "bigram_scale"},
                     {"bigram_table.codes", "bigram_table.scales", "bigram.codes", "bigram.scales", "bigram_scale"}),
    "smear-input": ({"gate_window": 3}, {"smear_gate_enabled": True}, {"smear_weight", "smear_scale"},
                    {"smear_weight", "smear_scale"}),
    "smear-vector": ({"smear_gate_mode": "vector"}, {"smear_gate_enabled": True, "smear_gate_mode": "vector"},
                     {"smear_theta"}, {"smear_theta"}),
    "value-embeddings": ({"ve_layers": "0,3"}, {"ve_enabled": True, "ve_dim": 0}, {"ve_table", "ve_layer_scale"},
                         {"ve_table.codes", "ve_table.scales", "ve_layer_scale"}),
    "value-embedding": ({"ve_dim": 7, "ve_layers": "0,3"}, {"ve_enabled": True, "ve_dim": 7, "ve_layers": "0,3"},
                        {"ve_table", "ve_bank", "ve_scale", "ve_layer_scale"},
                        {"ve_table.codes", "ve_table.scales", "ve.codes", "ve.scales", "ve_scale", "ve_layer_scale"}),
    "bigram-values": ({"ve_bigram_rows": 13}, {"ve_enabled": True, "ve_bigram_rows": 13},
                      {"ve_table", "ve_bigram_table", "ve_layer_scale"},
                      {"ve_table.codes", "ve_table.scales", "ve_bigram_table.codes", "ve_bigram_table.scales",
                       "ve_layer_scale"}),
    "sparse-gate": ({"sparse_attn_gate_scale": 3.0, "gate_window": 2}, {"sparse_attn_gate_enabled": True},
                    {"attn_gate"}, GATE),
    "gated": ({"gate_window": 2}, {"gated_attn_enabled": True}, {"attn_gate"}, GATE),
    "out-gate": ({"gate_window": 2}, {"attn_out_gate_enabled": True}, {"attn_gate"}, GATE),
    "yarn": ({"train_seq_len": 20}, {"rope_yarn": True, "train_seq_len": 10}, set(), set()),
    "key-offset": ({"key_offset": False}, {"key_offset": True}, set(), set()),
    "untied": ({"head_lr": 0.5}, {"tie_embeddings": False}, {"head"}, {"head.codes", "head.scales"}),
    "factorised": ({"embedding_dim": 0}, {"embedding_dim": 9}, {"embed_in_bank", "embed_out_bank"},
                   {"embed_in.codes", "embed_in.scales", "embed_out.codes", "embed_out.scales"}),
}


@pytest.mark.parametrize("name", TECHNIQUES_OFF)
def test_off_is_absent(name):
    off, on, added, stored = TECHNIQUES_OFF[name]
    plain_cfg, off_cfg, on_cfg = tiny(), tiny(**off), tiny(**on)
    plain, without, with_it = (random_model(cfg) for cfg in (plain_cfg, off_cfg, on_cfg))
    names = set(dict(plain.named_parameters()))
    assert set(dict(without.named_parameters())) == names
    assert set(dict(with_it.named_parameters())) == names | added
    assert stored_bytes(off_cfg, without) == stored_bytes(plain_cfg, plain)
    assert set(stored_bytes(on_cfg, with_it)) == set(stored_bytes(plain_cfg, plain)) | stored
    for bounds in (False, True):
        expected, got, changed = (everything(c, m, bounds) for c, m in (
            (plain_cfg, plain), (off_cfg, without), (on_cfg, with_it)))
        assert set(got) == set(expected) == names | {"losses"}
        for key in expected:
            assert torch.equal(got[key], expected[key]), key
        assert (changed["losses"] - expected["losses"]).abs().max() > 1e-3
        assert set(changed) == names | added | {"losses"}
        assert all(changed[key].any() for key in added)


def test_plain_model_has_only_the_plain_parameters():
    assert set(dict(tg.GPT(tiny(), bos=BOS).named_parameters())) == {
        "tok_emb", "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "resid_mix", "attn_scale", "mlp_scale",
        "q_gain", "skip_weight", "skip_gate"}


def test_plain_settings_have_every_technique_off():
    cfg = bare()
    assert not any((cfg.num_loops, cfg.varlen_enabled, cfg.bigram_vocab_size, cfg.smear_gate_enabled, cfg.ve_enabled,
                    cfg.sparse_attn_gate_enabled, cfg.gated_attn_enabled, cfg.attn_out_gate_enabled, cfg.rope_yarn,
                    cfg.embedding_dim, cfg.swa_enabled, cfg.qat_enabled, cfg.qat_lite_enabled, cfg.muon_row_normalize,
                    cfg.muon_qk_heads))
    assert cfg.tie_embeddings and cfg.muon_ns == "quintic" and cfg.parallel_start_layer >= cfg.num_layers


def test_yarn_within_the_training_length_changes_nothing():
    cfg = tiny(rope_yarn=True, train_seq_len=23)
    model, plain = random_model(cfg), random_model(tiny())
    for bounds in (False, True):
        assert torch.equal(everything(cfg, model, bounds)["losses"], everything(cfg, plain, bounds)["losses"])


def test_factorised_embedding_of_the_model_width():
    """Whether it then has projections or not, the model must work and be stored whole."""
    cfg = tiny(embedding_dim=32)
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    model(ids, targets).mean().backward()
    assert all(p.grad.any() for p in model.parameters())
    assert stored_bytes(cfg, model)


@pytest.mark.parametrize("changes", [
    {"ve_enabled": True, "ve_layers": "1,6"},
    {"qat_lite_enabled": True, "qat_lite_layer_start": 6},
    {"num_loops": 2, "loop_schedule": "0.2:3,0.5:2"},
    {"num_loops": 2, "loop_schedule": "0.1.5:2"},
    {"num_loops": 2, "loop_schedule": ".:2"},
    {"num_loops": 2, "loop_schedule": "0.55:1,0.35:2"},  # once would never run
    {"num_loops": 2, "loop_schedule": "9:1,9:2"},
])
def test_settings_that_could_not_train_are_refused(changes):
    with pytest.raises(tg.RunError):
        tiny(**changes)


def test_looping_may_begin_after_any_number_of_steps():
    for begin in (0.0, 1e-9, 0.35, 2206.0, 1e17):
        cfg = tiny(num_loops=2, enable_looping_at=begin, iterations=0, max_wallclock_seconds=1.0)
        assert cfg.loop_stages() == [(begin, 2)]


# ----- neutral initial values


NEUTRAL = {  # what turns it on; what it is compared with; the parameters that must be able to move
    "alpha": (LOOPS | {"recur_blend": "alpha"}, LOOPS, {"recur_blend"}),
    "ab": (LOOPS | {"recur_blend": "ab"}, LOOPS, {"recur_blend"}),
    "out-gate": ({"attn_out_gate_enabled": True}, {}, {"attn_gate"}),
    "smear-input": ({"smear_gate_enabled": True}, {}, {"smear_scale"}),
    "bigram": ({"bigram_vocab_size": 13, "bigram_dim": 20}, {}, {"bigram_table"}),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_initial_values_change_nothing_and_can_move(name):
    on, off, movable = NEUTRAL[name]
    cfg = tiny(**on)
    model, plain = tg.GPT(cfg, bos=BOS), random_model(tiny(**off))
    base = dict(plain.named_parameters())
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key in base:
                p.copy_(base[key])
    for bounds in (False, True):
        got, expected = everything(cfg, model, bounds), everything(cfg, plain, bounds)
        for key in expected:
            if key == "losses" or name != "bigram":
                assert torch.equal(got[key], expected[key]), key
        for key in movable:
            grad = got[key].flatten(0, -2) if got[key].ndim > 1 else got[key].view(1, -1)
            used = torch.ones(len(grad), dtype=torch.bool)
            if name == "bigram":  # each bucket that occurs
                ids, _ = packed_text(cfg)
                used[:] = False
                used[tg.bigram_bucket(ids, tg.document_starts(ids, BOS), 13).flatten().long()] = True
                assert used.sum() > 6
            assert (grad[used] != 0).all(), key
    for key in movable:  # and once it has moved it does something
        with torch.no_grad():
            dict(model.named_parameters())[key].add_(0.1)
    assert (everything(cfg, model, True)["losses"] - expected["losses"]).abs().max() > 1e-4


def test_initial_values():
    cfg = tiny(**ALL | {"recur_a_init": 0.9, "recur_b_init": 0.2, "vocab_size": 500})
    model = tg.GPT(cfg, bos=BOS)
    assert model.recur_blend.shape == (2, 2, 2)
    assert torch.equal(model.recur_blend, torch.tensor([0.9, 0.2]).expand(2, 2, 2))
    assert (model.lane_keep == torch.tensor(1.1)).all() and (model.lane_write == 1).all()
    assert model.lane_keep.shape == (2, 2) and model.lane_write.shape == (2, 2, 2)
    assert not model.bigram_table.any() and model.bigram_scale == torch.tensor(0.05)
    assert not model.smear_scale.any() and not model.smear_weight.any() and not model.attn_gate.any()
    assert abs(model.ve_table.std() / 0.01 - 1) < 0.1 and abs(model.ve_table.mean()) < 0.001
    assert model.ve_scale == torch.tensor(0.1) and (model.ve_layer_scale == 1).all()
    own = tg.GPT(tiny(ve_enabled=True, ve_dim=0, vocab_size=500), bos=BOS)
    assert own.ve_table.shape == (500, 3 * 16) and abs(own.ve_table.std() / 0.01 - 1) < 0.1
    assert own.ve_layers == [1, 3, 5] and (own.ve_layer_scale == torch.ones(3)).all()
    for bank in (model.bigram_bank[0], model.ve_bank[0]):
        assert bank.size(0) > bank.size(1) and (bank.T @ bank - torch.eye(bank.size(1))).abs().max() < 1e-5
    for blend, value in (("alpha", 0.7), ("gate", 4.0)):
        other = tg.GPT(tiny(num_loops=2, recur_blend=blend, recur_alpha_init=0.7), bos=BOS)
        assert other.recur_blend.shape == (2, 2, 1) and (other.recur_blend == torch.tensor(value)).all()
    assert tg.GPT(tiny(parallel_mode="lanes", parallel_start_layer=3), bos=BOS).lane_mix == 0.5
    assert not tg.GPT(tiny(smear_gate_enabled=True, smear_gate_mode="vector"), bos=BOS).smear_theta.any()
    gate = tg.GPT(tiny(gated_attn_enabled=True, num_layers=30), bos=BOS).attn_gate
    assert gate.shape == (30, 4, 32) and abs(gate.std() / 0.01 - 1) < 0.1


# ----- packed documents


PACKED = LOOPS | {"bigram_vocab_size": 13, "bigram_dim": 6, "smear_gate_enabled": True, "ve_enabled": True,
                  "ve_layers": "1,3", "recur_blend": "ab", "train_seq_len": 23}


@pytest.mark.parametrize("changes", [
    {"attn_out_gate_enabled": True, "key_offset": True},
    {"gated_attn_enabled": True, "smear_gate_mode": "vector", "parallel_mode": "lanes", "parallel_start_layer": 4},
    {"sparse_attn_gate_enabled": True, "parallel_mode": "crossed", "parallel_start_layer": 4, "rope_yarn": True},
], ids=["sequential", "lanes", "crossed"])
@pytest.mark.parametrize("max_len", [1, 4, 9, 14, 23])
def test_packed_documents_equal_documents_alone(changes, max_len):
    cfg = tiny(**PACKED | changes)
    packed, alone, (ids, targets) = random_model(cfg), random_model(cfg), packed_text(cfg)
    share = random_share(targets)
    losses = packed(ids, targets, tg.Bounds.find(ids, BOS, max_len))
    (losses * share).sum().backward()

    def by_itself(row: int, a: int, b: int) -> torch.Tensor:
        document = ids[row : row + 1, a:b]
        return alone(document, targets[row : row + 1, a:b], tg.Bounds.find(document, BOS, max_len))[0]

    expected, gradients, _ = by_piece(document_spans(ids, 23), by_itself, share, dict(alone.named_parameters()))
    assert_close(losses, expected, 2e-5)
    # where attention has no choice some gradients are 0 but for rounding, which whole documents give a scale
    sizes = sizes_of_gradients(alone, ids, targets, share)
    for name, p in packed.named_parameters():
        assert_close(p.grad, gradients[name], 5e-5, name, sizes[name])


def leaks(cfg: tg.Settings) -> list[int]:
    """Places whose loss changes though nothing of their own piece of a document does; checks that others change.

    The first document, the last token of a piece that is cut by length, and a whole other row are perturbed. What looks
    one token back reaches from a piece into the rest of its document, but no further.
    """
    looks_back = cfg.smear_gate_enabled or cfg.bigram_vocab_size
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    bounds = tg.Bounds.find(ids, BOS, 8)
    before, found = model(ids, targets, bounds), []
    pieces, documents = ([(row * 23 + a, row * 23 + b) for row, a, b in document_spans(ids, most)] for most in (8, 23))
    assert {b - a for a, b in pieces} >= {1, 3, 6, 8}
    for start, stop in pieces:
        other = ids.flatten().clone()
        inner = [t for t in range(start, stop) if other[t] != BOS]
        if not inner:
            continue
        other[inner] = (other[inner] - 2 + 9) % (cfg.vocab_size - 2) + 2
        changed = (model(other.view_as(ids), targets, bounds) != before).flatten()
        counted = targets.flatten() != tg.IGNORE
        assert changed[inner][counted[inner]].all()
        end = next(b for _, b in documents if b >= stop) if looks_back else stop
        found += [t for t in changed.nonzero().flatten().tolist() if not start <= t < end]
    return found


@pytest.mark.parametrize("loops", [0, 2])
@pytest.mark.parametrize("parallel", [None, "gptj", "lanes", "crossed"])
@pytest.mark.parametrize("smear", [None, "input", "vector"])
def test_no_document_reaches_another(smear, parallel, loops):
    for bigram in (0, 13):
        changes = {"num_loops": loops, "bigram_vocab_size": bigram, "bigram_dim": 6, "recur_blend": "ab"}
        if smear:
            changes |= {"smear_gate_enabled": True, "smear_gate_mode": smear}
        if parallel:
            changes |= {"parallel_mode": parallel, "parallel_start_layer": 4, "key_offset": True}
        assert leaks(tiny(**changes)) == []


@pytest.mark.parametrize("fault, changes", [
    ("smear", {"smear_gate_enabled": True}),
    ("smear", {"smear_gate_enabled": True, "smear_gate_mode": "vector"}),
    ("bigram", {"bigram_vocab_size": 13, "bigram_dim": 6}),
    ("keys", {"key_offset": True}),
    ("attention", {}),
], ids=["smear-input", "smear-vector", "bigram", "keys", "attention"])
def test_the_check_for_leaks_notices_one(monkeypatch, fault, changes):
    cfg = tiny(**changes)
    assert leaks(cfg) == []
    if fault == "smear":
        monkeypatch.setattr(tg, "previous", lambda x, starts: x.flatten(0, 1).roll(1, 0).view_as(x))
    elif fault == "bigram":
        bucket = tg.bigram_bucket
        monkeypatch.setattr(tg, "bigram_bucket", lambda ids, starts, n: bucket(
            ids.view(1, -1), torch.zeros(1, ids.numel(), dtype=torch.bool), n).view_as(ids))
    elif fault == "keys":
        monkeypatch.setattr(tg, "span_starts", lambda ids, bounds: torch.zeros_like(ids, dtype=torch.bool))
    else:
        find = tg.Bounds.find
        monkeypatch.setattr(tg.Bounds, "find", lambda ids, bos, max_len: find(ids, -1, 23))
    assert leaks(cfg)


def test_rows_without_varlen_mask_the_document_start_too():
    """Attention crosses documents there, SmearGate and BigramHash do not."""
    cfg = tiny(num_layers=1, loop_end=0, loop_start=0, smear_gate_enabled=True, bigram_vocab_size=13, bigram_dim=6)
    model, (ids, targets) = random_model(cfg), packed_text(cfg)
    with torch.no_grad():
        model.qo_bank[1:] = 0  # no attention: what is left is the token itself and the one before it
    other = ids.clone()
    other[0, 17] = (ids[0, 17] + 3) % 20 + 2
    changed = (model(ids, targets) != model(other, targets)).nonzero().tolist()
    assert changed == [[0, 17]]
    assert ids[0, 18] == BOS
