import pytest
import torch
from conftest import tiny_model

from dlpkit import allocation as allocations
from dlpkit import archs, criteria, pruning
from dlpkit.journal import Journal
from dlpkit.patterns import Pattern


def zeros(model):
    return {name: (linear.weight == 0) for name, linear in archs.model_linears(model, archs.of(model))}


def weights(model):
    return {name: linear.weight.clone() for name, linear in archs.model_linears(model, archs.of(model))}


@pytest.mark.parametrize("kind", archs.names())
def test_every_architecture_is_pruned_and_still_runs(kind, tokens):
    model = tiny_model(kind)
    report = pruning.prune(model, tokens, "wanda", 0.5, "dlp")
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize("criterion", criteria.names())
@pytest.mark.parametrize("allocation", allocations.names())
@pytest.mark.parametrize("pattern", ["0.6", "0.6@32", "2:4"])
def test_every_combination(criterion, allocation, pattern, tokens):
    model = tiny_model()
    report = pruning.prune(model, tokens, criterion, pattern, allocation)
    expected = Pattern.parse(pattern).sparsity
    assert report.sparsity == pytest.approx(expected, abs=0.02)  # whole weights per row or block
    found = sum(int(z.sum()) for z in zeros(model).values())
    assert found == sum(linear.zeros for linear in report.linears)


def test_wanda_uniform_is_its_formula_on_the_pruned_prefix(tokens):
    """Block 0 by the formula; block 1's inputs come through the pruned block 0."""
    model, other = tiny_model(), tiny_model()
    pruning.prune(model, tokens, "wanda", 0.5, "uniform")
    for index in (0, 1):
        seen = {}
        hooks = [
            linear.register_forward_pre_hook(
                lambda m, a, name=name, seen=seen: seen.update({name: a[0].flatten(0, -2)})
            )
            for name, linear in archs.linears(other.model.layers[index], archs.of(other)).items()
        ]
        other(tokens)
        for hook in hooks:
            hook.remove()
        for name, linear in archs.linears(other.model.layers[index], archs.of(other)).items():
            score = linear.weight.abs() * seen[name].norm(dim=0)
            drop = score.argsort(dim=1, stable=True)[:, : round(0.5 * score.shape[1])]
            linear.weight.data.scatter_(1, drop, 0.0)
            assert torch.equal(linear.weight, model.model.layers[index].get_submodule(name).weight)


def test_linear_granularity_spreads_within_a_block(tokens):
    model = tiny_model()
    report = pruning.prune(model, tokens, "wanda", 0.5, "dlp", granularity="linear")
    assert len({linear.pattern for linear in report.linears if linear.block == 0}) > 2
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_allocation_options_reach_the_allocation(tokens):
    model = tiny_model()
    report = pruning.prune(model, tokens, "magnitude", 0.5, "dlp", options={"alpha": 0.02, "strategy": "mean"})
    patterns = [float(linear.pattern) for linear in report.linears]
    assert max(patterns) - min(patterns) == pytest.approx(0.04, abs=1e-4)


def test_uniform_magnitude_reads_no_text():
    assert pruning.prune(tiny_model(), [], "magnitude", 0.5, "uniform").sparsity == pytest.approx(0.5, abs=1e-3)


def test_mixed_nm_meets_the_budget():
    sizes = [1000.0] * 10
    sparsities = torch.linspace(0.3, 0.7, 10).tolist()
    mixed = pruning.patterns_of(Pattern.parse("4:8"), sparsities, sizes)
    assert sum(p.n for p in mixed) == 40
    assert all(abs(p.sparsity - s) < 1 / 8 for p, s in zip(mixed, sparsities, strict=True))
    assert [p.n for p in mixed] == sorted((p.n for p in mixed), reverse=True)


@pytest.mark.parametrize("stop", [("measure", 2), ("prune", 1), ("prune", 2)])
def test_a_stopped_run_goes_on_to_the_identical_result(stop, tokens, tmp_path):
    expected = tiny_model()
    pruning.prune(expected, tokens, "sparsegpt", 0.6, "dlp")

    def interrupt(stage, done, of):
        if (stage, done) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruning.prune(
            tiny_model(), tokens, "sparsegpt", 0.6, "dlp", journal=Journal(tmp_path / "j", {}), progress=interrupt
        )
    seen = []
    model, journal = tiny_model(), Journal(tmp_path / "j", {})
    assert journal.finished_blocks == (stop[1] if stop[0] == "prune" else 0)
    pruning.prune(model, tokens, "sparsegpt", 0.6, "dlp", journal=journal, progress=lambda *step: seen.append(step[0]))
    assert all(torch.equal(a, b) for a, b in zip(weights(expected).values(), weights(model).values(), strict=True))
    assert ("measure" in seen) == (stop[0] == "measure")  # a finished dense pass is not repeated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": 1.5}, "0 <= sparsity < 1"),
        ({"pattern": "4:2"}, "0 < N <= M"),
        ({"pattern": "3:5"}, r"layers\.0\.self_attn\.q_proj has 64 inputs, not a multiple of 5"),
        ({"criterion": "guess"}, "choose one of magnitude, ria, sparsegpt, wanda"),
        ({"allocation": "guess"}, "choose one of"),
        ({"options": {"beta": 1}}, "does not take beta"),
        ({"granularity": "row"}, "per block or per linear"),
    ],
)
def test_wrong_requests_touch_nothing(change, message, tokens):
    model = tiny_model()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        pruning.prune(model, tokens, **{"criterion": "wanda", "pattern": 0.5, "allocation": "dlp", **change})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(model).values(), strict=True))
