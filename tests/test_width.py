"""The walk that turns ranks into slices, and each method's score against its formula written down plainly."""

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

import dlpkit
from dlpkit import archs, edits, surgery
from dlpkit.edits import Slice
from dlpkit.gradients import Terms, terms
from dlpkit.structure import _width, flap, llm_pruner, magnitude_sp, saap, wanda_sp

BATCHES = list(torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(2)).split(2))


def model_of(layers=8):
    return tiny_model(num_hidden_layers=layers)


def scores_of(held, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {half: torch.rand(room.units, generator=draw) for half, room in held.items()}


def test_the_published_counts_of_llm_pruner():
    """LLaMA-7B with a quarter of the heads and channels of layers 4 to 29 gone, from nothing but that share of all parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    held = _width.rooms(model)
    assert sorted({layer for layer, _ in held}) == list(range(4, 30))
    plan = _width.choose(model, _width.shares(scores_of(held)), 1 - 5_422_977_024 / 6_738_415_616, held)
    assert {(edit.part, len(edit.units)) for edit in plan.edits} == {("attn", 24), ("mlp", 8256)}
    surgery.apply(model, plan.edits)
    assert sum(p.numel() for p in model.parameters()) == 5_422_977_024


@pytest.mark.parametrize("target", [0.05, 0.2, 0.33, 0.5])
@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_the_budget_is_met_to_one_step(target, multiple):
    model = model_of()
    total = sum(p.numel() for p in model.parameters())
    held = _width.rooms(model, 0, 0, multiple)
    plan = _width.choose(model, scores_of(held), target, held)
    dlpkit.edit(model, plan.edits)
    gone = 1 - sum(p.numel() for p in model.parameters()) / total
    assert plan.shares[-1] == pytest.approx(gone, abs=1e-12)
    assert target <= gone < target + multiple * held[0, "mlp"].parameters / total
    assert all(len(edit.units) % multiple == 0 for edit in plan.edits if edit.part == "mlp")


def test_first_and_last_layers_are_left_alone():
    model = model_of()
    for first, last in ((2, 1), (0, 3)):
        layers = {edit.layer for edit in llm_pruner.plan(model, BATCHES, 0.3, first=first, last=last).edits}
        assert layers == set(range(first, 8 - last))
    with pytest.raises(ValueError, match="fewer than all 8, got 8, 4 and 4"):
        llm_pruner.plan(model, BATCHES, 0.1, first=4, last=4)


def test_the_lowest_scores_go():
    model = model_of()
    held = _width.rooms(model)
    scores = scores_of(held)
    for edit in _width.choose(model, _width.shares(scores), 0.3, held).edits:
        score = scores[edit.layer, edit.part]
        gone = [unit for unit in range(len(score)) if unit not in edit.units]
        assert score[gone].max() < score[list(edit.units)].min()


def test_every_half_loses_the_same_share_or_its_weight():
    model = model_of()
    held = {half: room for half, room in _width.rooms(model, multiple=1).items() if half[1] == "mlp"}
    scores = scores_of(held)
    counts = [96 - len(edit.units) for edit in _width.choose(model, _width.shares(scores), 200, held).edits]
    assert sum(counts) == 200
    assert max(counts) - min(counts) <= 1
    weights = {half: 2.0 if half[0] < 3 else 1.0 for half in held}
    found = {
        edit.layer: 96 - len(edit.units)
        for edit in _width.choose(model, _width.shares(scores, weights), 240, held).edits
    }
    assert found == {1: 60, 2: 60, 3: 30, 4: 30, 5: 30, 6: 30}


def test_where_heads_are_few_the_least_important_of_all_layers_go():
    model = model_of()
    held = {half: room for half, room in _width.rooms(model).items() if half[1] == "attn"}
    scores = {half: torch.tensor([half[0] * 1.0, 100.0]) for half in held}
    chosen = _width.choose(model, _width.shares({half: scores[half] for half in reversed(held)}), 3, held).edits
    assert chosen == [Slice(layer, "attn", (1,)) for layer in (1, 2, 3)]


def test_fusion_by_one_uncertainty_of_each_kind():
    """F1: with s^2 = mean I, the scale of either importance has no say."""
    draw = torch.Generator().manual_seed(0)
    v, e = torch.rand(2, 3, 5, 4, generator=draw)  # [kinds, members, batches, units]
    found = {(0, "mlp"): Terms(v, e, v.mean(1))}
    fused = saap.fuse(found, "F1")[0, "mlp"]
    expected = v.sum(0) / (2 * v.sum(0).mean()) + e.sum(0) / (2 * e.sum(0).mean())
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(saap.fuse({(0, "mlp"): Terms(1e-6 * v, e, v.mean(1))}, "F1")[0, "mlp"], expected)


def test_learned_uncertainty_settles_at_the_closed_form():
    values = torch.tensor([3e-4, 1e-4, 5e-4]).expand(50, 3)
    assert saap._learned(values) == pytest.approx(3e-4, rel=1e-3)
    rising = torch.linspace(1e-4, 5e-4, 200)[:, None].expand(200, 3)
    assert 3e-4 < saap._learned(rising) < 5e-4  # it follows what the last batches said


def test_fusion_by_an_uncertainty_of_each_unit_ranks_by_the_product():
    v, e = torch.tensor([[[4.0, 1.0, 2.0]]]), torch.tensor([[[1.0, 9.0, 1.0]]])
    assert saap.fuse({(0, "attn"): Terms(v, e, v[:, 0])}, "F3")[0, "attn"].tolist() == [
        [2.0, 3.0, pytest.approx(2**0.5)]
    ]


def test_instability_is_relative():
    importance = torch.tensor([[1.0, 100.0, 0.0, 2.0], [3.0, 300.0, 0.0, 2.0]])
    assert saap.instability(importance).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_the_two_searches():
    """S1 removes the most unstable units of all layers; S2 the least important, more of them where a layer is unstable."""
    model, found = model_of(), terms(model_of(), BATCHES)
    held = _width.rooms(model)
    fused = saap.fuse({half: found[half] for half in held}, "F1")
    unstable = {half: saap.instability(value) for half, value in fused.items()}
    literal = saap.plan(model, BATCHES, 300, search="S1", multiple=1).edits
    gone = {(e.layer, e.part): [u for u in range(len(unstable[e.layer, e.part])) if u not in e.units] for e in literal}
    least_gone = min(unstable[half][units].min() for half, units in gone.items())
    kept = [
        unstable[half][[u for u in range(len(unstable[half])) if u not in gone.get(half, [])]]
        for half in held
        if half[1] == "mlp"
    ]
    assert max(value.max() for value in kept) <= least_gone
    milder = saap.plan(model, BATCHES, 0.2, search="S2")
    lost = {edit.layer: 96 - len(edit.units) for edit in milder.edits if edit.part == "mlp"}
    mean = {layer: unstable[layer, "mlp"].mean().item() for layer in lost}
    assert lost[max(mean, key=mean.get)] > lost[min(mean, key=mean.get)]


@pytest.mark.parametrize("method", [flap, wanda_sp])
def test_activation_scores_by_hand(method):
    """Of layer 3's MLP, from the activations of the whole model."""
    model, seen = model_of(), []
    down = model.model.layers[3].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(torch.cat(BATCHES))
    handle.remove()
    x = torch.cat(seen)
    if method is flap:
        score = x.var(0, unbiased=False) * down.weight.square().sum(0)
    else:
        score = down.weight.abs().sum(0) * x.norm(dim=0)
    plan = method.plan(model, BATCHES, 60, first=3, last=4, multiple=1)
    kept = next(edit.units for edit in plan.edits if edit.part == "mlp")
    gone = [unit for unit in range(96) if unit not in kept]
    assert score[gone].max() < score[list(kept)].min()


def test_magnitude_counts_all_weights_of_a_unit():
    model = model_of()
    mlp = model.model.layers[3].mlp
    norms = (
        mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1) + mlp.down_proj.weight.square().sum(0)
    ).sqrt()
    kept = next(
        edit.units for edit in magnitude_sp.plan(model, BATCHES, 0.2).edits if (edit.layer, edit.part) == (3, "mlp")
    )
    assert sorted(norms.argsort(descending=True)[: len(kept)].tolist()) == list(kept)


def test_llm_pruners_scores_are_its_terms():
    model = model_of()
    found = terms(model, BATCHES)
    for term, expected in (
        ("element", found[3, "mlp"].element.mean(1).sum(0)),
        ("vector", found[3, "mlp"].pooled.sum(0)),
    ):
        plan = llm_pruner.plan(model, BATCHES, 0.2, term=term)
        kept = next(edit.units for edit in plan.edits if (edit.layer, edit.part) == (3, "mlp"))
        assert sorted(expected.argsort(descending=True)[: len(kept)].tolist()) == list(kept)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="two or more, got 1"):
        saap.plan(model_of(), BATCHES[:1], 0.2)
    with pytest.raises(ValueError, match="fusion is one of F1, F2, F3"):
        saap.plan(model_of(), BATCHES, 0.2, fusion="F4")
    with pytest.raises(ValueError, match="term is one of element, vector"):
        llm_pruner.plan(model_of(), BATCHES, 0.2, term="scalar")


def test_width_after_depth(tokens):
    """The small models that combine both: layers are dropped first, and what is left is measured and sliced."""
    model = model_of()
    dlpkit.edit(model, [dlpkit.Drop(5, "layer"), dlpkit.Drop(2, "attn")])
    plan = saap.plan(model, BATCHES, 0.15)
    assert (2, "attn") not in {(edit.layer, edit.part) for edit in plan.edits}
    dlpkit.edit(model, plan.edits)
    assert len(archs.blocks(model, archs.of(model))) == 7
    assert {edits.Drop(2, "attn")} < set(surgery.residue(model))
    dlpkit.prune(model, torch.cat(BATCHES), "wanda", 0.5, "dlp", device="cpu")
    assert torch.isfinite(model(tokens).logits).all()
