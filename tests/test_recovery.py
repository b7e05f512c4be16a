import dataclasses

import pytest
import torch
from conftest import random_sparse, tiny_model

import dlpkit
from dlpkit import Drop, Slice, archs, recovery
from dlpkit.journal import Journal
from dlpkit.packing import sparse_linears
from dlpkit.recovery import METHODS, Settings

pytest.importorskip("peft")
from dlpkit import adapters

SMALL = {"steps": 12, "batch_size": 4, "eval_every": 4, "rank": 4, "group": 16, "lr": 3e-3}
EXACT = [method for method in METHODS if method != "lora"]  # what is trained is what comes out


def pruned(kind="llama", dtype=torch.float32, sparsity=0.7):
    model = tiny_model(kind, dtype)
    for i, (_, linear) in enumerate(archs.model_linears(model, archs.of(model))):
        linear.weight.data.mul_(random_sparse(*linear.weight.shape, sparsity, seed=i) != 0)
    return model


def zeros(model):
    packed = sparse_linears(model)
    return {
        name: (packed[name].dense() if name in packed else linear.weight) == 0
        for name, linear in archs.model_linears(model, archs.of(model))
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def text():
    """[24, 16] windows of a text that repeats itself, and [4, 16] held out."""
    windows = (torch.arange(28 * 16) * 7 % 31).view(28, 16)
    return windows[4:], windows[:4]


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt", "gpt_neox"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_zeros_stay(method, kind, text):
    model = pruned(kind)
    before = zeros(model)
    steps = []
    recovered, done = recovery.recover(
        model, *text, Settings(method, **SMALL), "cpu", progress=lambda stage, at, of: steps.append((stage, at, of))
    )
    assert same(zeros(recovered), before)
    assert done.validation[-1][1] < done.validation[0][1] - 0.1
    assert done.losses[-1] < done.losses[0] - 0.1
    assert done.merged < done.validation[0][1]
    assert (done.steps, done.tokens, len(done.losses)) == (12, 12 * 4 * 15, 12)
    assert steps[-1] == ("train", 12, 12)
    assert not any("lora" in name for name, _ in recovered.named_modules())
    assert not any(parameter.requires_grad for parameter in recovered.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["masked", "grouped"])
def test_merging_changes_nothing(method, dtype, text, tokens):
    settings = Settings(method, **SMALL)
    adapted = recovery.prepare(pruned(dtype=dtype), settings)
    recovery.train(adapted, *text, settings, dtype)
    expected = adapted(tokens).logits
    merged = recovery.finish(adapted, dtype)
    assert merged.dtype == dtype
    assert torch.equal(merged(tokens).logits, expected)


def test_plain_lora_is_cut_by_the_merge(text):
    """The reason for the masked methods: the part of B A that lies on zeros is lost."""
    lora, masked = (
        recovery.recover(pruned(), *text, Settings(method, **SMALL), "cpu")[1] for method in ("lora", "masked")
    )
    assert lora.merged > min(loss for _, loss in lora.validation) + 0.01
    assert masked.merged == pytest.approx(min(loss for _, loss in masked.validation), abs=1e-6)


@pytest.mark.parametrize("format", ["dense", "sell"])
def test_a_packed_model_trains_packed_and_stays_packed(format, text, tokens, tmp_path):
    model = dlpkit.pack(pruned(dtype=torch.bfloat16), format)
    before = model.state_dict()
    recovered, done = recovery.recover(model, *text, Settings("lora", **SMALL), "cpu")
    assert done.validation[-1][1] < done.validation[0][1]
    after = recovered.state_dict()
    masks = [key for key in before if key.endswith(("weight_mask", "weight_offsets"))]
    assert len(masks) == 2 * 7 * 3
    assert all(torch.equal(before[key], after[key]) for key in masks)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    dlpkit.save(recovered, tmp_path / "out")
    again = dlpkit.load(tmp_path / "out", "dense")
    torch.testing.assert_close(again(tokens).logits, recovered(tokens).logits, rtol=5e-2, atol=5e-2)  # bfloat16


def test_the_other_methods_unpack(text):
    recovered, _ = recovery.recover(dlpkit.pack(pruned()), *text, Settings("masked", **SMALL), "cpu")
    assert not sparse_linears(recovered)
    with pytest.raises(ValueError, match="unpack the model first"):
        adapters.attach(dlpkit.pack(pruned()), "masked")


@pytest.mark.parametrize("group", [16, 48])  # 48 leaves a group of 16
def test_grouped_adapters_share_columns(group, text):
    settings = Settings("grouped", **SMALL | {"group": group})
    model = tiny_model()
    before = {name: linear.weight.clone() for name, linear in archs.model_linears(model, archs.of(model))}
    adapted = recovery.prepare(model, settings)
    recovery.train(adapted, *text, settings, torch.float32)
    name = "model.layers.1.mlp.up_proj"
    layer = adapted.get_base_model().get_submodule(name)
    assert layer.lora_A["default"].weight.shape == (4, {16: 4, 48: 2}[group])
    merged = recovery.finish(adapted, torch.float32)
    delta = merged.get_submodule(name).weight - before[name]
    for part in delta.split(group, 1):
        torch.testing.assert_close(part, part[:, :1].expand_as(part), rtol=0, atol=1e-6)  # float32
        assert part.abs().max() > 1e-3


def test_a_merge_that_fills_zeros_is_refused(text, monkeypatch):
    monkeypatch.setattr(adapters, "keep_zeros", lambda new, old: new.to(old.dtype))
    with pytest.raises(RuntimeError, match=r"layers\.0\..* zeros and now has .*: the merge is wrong"):
        recovery.recover(pruned(), *text, Settings("lora", **SMALL), "cpu")


@pytest.mark.parametrize("method", METHODS)
def test_models_that_lost_depth_and_width_recover(method, text, tokens, tmp_path):
    model = tiny_model(num_hidden_layers=5)
    dlpkit.edit(
        model, [Drop(1, "attn"), Drop(3, "layer"), Slice(2, "attn", 1), Slice(0, "mlp", 56), Slice(2, "mlp", 40)]
    )
    recovered, done = recovery.recover(model, *text, Settings(method, **SMALL), "cpu")
    assert done.merged < done.validation[0][1]
    dlpkit.save(recovered, tmp_path / "out")
    assert torch.equal(dlpkit.load(tmp_path / "out")(tokens).logits, recovered(tokens).logits)


def test_pefts_own_merge_keeps_zeros_too(text):
    settings = Settings("masked", **SMALL)
    model = pruned()
    before = zeros(model)
    adapted = recovery.prepare(model, settings)
    recovery.train(adapted, *text, settings, torch.float32)
    assert same(zeros(adapted.merge_and_unload()), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(method, text, tmp_path):
    settings = Settings(method, **SMALL)
    whole, done = recovery.recover(pruned(), *text, settings, "cpu")

    def die(stage, at, of):
        if at == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovery.recover(pruned(), *text, settings, "cpu", Journal(tmp_path / "j", {}), die)
    resumed, again = recovery.recover(pruned(), *text, settings, "cpu", Journal(tmp_path / "j", {}))
    assert same(whole.state_dict(), resumed.state_dict())
    for report in (done, again):
        report.seconds = 0.0
    assert dataclasses.asdict(done) == dataclasses.asdict(again)


def test_the_seed_decides(text):
    results = [
        recovery.recover(pruned(), *text, Settings(seed=seed, **SMALL), "cpu")[0].state_dict() for seed in (0, 0, 1)
    ]
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_it_stops_early_and_keeps_the_best(text):
    """Validated by text that has nothing of what is trained on, each step does harm."""
    windows, _ = text
    held_out = torch.randint(100, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    settings = Settings("masked", **SMALL | {"steps": 100, "eval_every": 2, "patience": 3})
    model = pruned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recovered, done = recovery.recover(model, windows, held_out, settings, "cpu")
    assert done.steps < 100
    assert done.best == min(done.validation, key=lambda pair: pair[1])[0]
    assert done.steps - done.best == 3 * 2
    if done.best == 0:
        assert same(recovered.state_dict(), before)


def test_every_window_is_seen_once_in_a_pass():
    windows = torch.arange(10)[:, None].expand(10, 2)
    settings = Settings(batch_size=4, steps=5)
    seen = torch.cat([recovery._batch(windows, settings, step)[:, 0] for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_weight_that_would_round_to_zero_is_kept_apart_from_it():
    old = torch.tensor([[1.0, -1.0, 0.0, -0.0, 2.0]], dtype=torch.bfloat16)
    new = adapters.keep_zeros(torch.tensor([[1e-45, 0.0, 5.0, 5.0, 3.0]]), old)
    assert (new == 0).tolist() == [[False, False, True, True, False]]
    assert (new < 0).tolist() == [[False, True, False, False, False]]
    assert new[0, 4] == 3
    assert not torch.signbit(new[0, 3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "magic"}, "one of masked, grouped, lora, full"),
        ({"steps": 0}, "steps of at least 1"),
        ({"lr": -1.0}, "lr > 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_wrong_input_is_refused(text):
    with pytest.raises(ValueError, match=r"held_out \[W, T\]"):
        recovery.recover(pruned(), text[0], text[1][0], Settings(), "cpu")
    broken = pruned()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="loss"):
        recovery.recover(broken, *text, Settings(**SMALL), "cpu")
