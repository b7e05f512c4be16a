"""Every structure on every tiny architecture, and each method against its paper's loop written down plainly."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM

import dlpkit
from dlpkit import archs, edits, structure, surgery
from dlpkit.edits import Drop, Merge
from dlpkit.evaluate import perplexity
from dlpkit.journal import Journal
from dlpkit.structure import _greedy, blockpruner, shortgpt, sleb, sliding_merge
from dlpkit.trunk import Trunk

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(2))
BATCHES = list(WINDOWS.split(2))


def model_of(kind="llama", layers=8):
    return tiny_model(kind, num_hidden_layers=layers)


def loss_with(model, chosen):
    with surgery.trial(model, chosen):
        return perplexity(model, WINDOWS).loss


def naive(model, candidates, count):
    """The loop of BlockPruner's algorithm 1 and of SLEB: the whole model for every candidate, every time."""
    chosen = []
    for _ in range(count):
        left = [edit for edit in candidates if structure.Budget(model).fits([*chosen, edit])]
        chosen.append(min(left, key=lambda edit: loss_with(model, [*chosen, edit])))
    return chosen


@pytest.mark.parametrize("kind", archs.names())
@pytest.mark.parametrize("name", structure.names())
def test_contract(name, kind, tokens, tmp_path):
    """A plan reaches its target and leaves the model alone; its edits apply, generate, save and load."""
    model = model_of(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    full = sum(parameter.numel() for parameter in model.parameters())
    plan = structure.get(name).plan(model, BATCHES, 0.2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(plan.edits) == len(plan.scores) == len(plan.shares)
    assert plan.shares == sorted(plan.shares)
    dlpkit.edit(model, plan.edits)
    left = sum(parameter.numel() for parameter in model.parameters())
    assert 1 - left / full == pytest.approx(plan.shares[-1], abs=1e-12)
    assert 0.2 <= plan.shares[-1] < 0.4
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **how), model.generate(tokens, use_cache=False, **how))
    dlpkit.save(model, tmp_path / "edited")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype="auto")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", structure.names())
@pytest.mark.parametrize(
    ("target", "message"), [(0, "whole number such as 12, got 0"), (1.5, "got 1.5"), (True, "got True"), (0.99, "out of reach"), (9999, "out of reach")]
)  # fmt: skip
def test_targets_out_of_reach(name, target, message):
    with pytest.raises(ValueError, match=message):
        structure.get(name).plan(model_of(), BATCHES, target)


def test_options_are_checked_by_name():
    structure.check_options("blockpruner", {"mode": "attn", "lazy": True})
    with pytest.raises(ValueError, match="blockpruner does not take speed: it takes early, lazy, mode"):
        structure.check_options("blockpruner", {"speed": 1})
    with pytest.raises(ValueError, match="shortgpt does not take journal: it takes no options"):
        structure.check_options("shortgpt", {"journal": 1})
    with pytest.raises(ValueError, match="mode is mix, attn, mlp, got 'both'"):
        blockpruner.plan(model_of(), BATCHES, 2, mode="both")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt_neox"])
@pytest.mark.parametrize("mode", blockpruner.MODES)
def test_blockpruner_is_the_naive_search(mode, kind):
    model = model_of(kind, layers=4)
    count = 2 if kind == "gemma2" else 3  # of its two kinds of attention, one of each stays
    plan = blockpruner.plan(model, BATCHES, count, mode=mode)
    candidates = [Drop(layer, part) for layer in range(4) for part in blockpruner.MODES[mode]]
    assert plan.edits == naive(model, candidates, count)
    for size, loss in enumerate(plan.scores, 1):
        assert loss == pytest.approx(loss_with(model, plan.edits[:size]), abs=1e-5)  # float32


def test_sleb_is_the_naive_search():
    model = model_of(layers=7)
    plan = sleb.plan(model, BATCHES, 4)
    assert plan.edits == naive(model, [Drop(layer, "layer") for layer in range(1, 6)], 4)
    assert plan.work.evaluations == 5 + 4 + 3 + 2
    assert plan.work.done < plan.work.naive


def test_one_search_serves_every_smaller_target():
    model = model_of()
    plan = blockpruner.plan(model, BATCHES, 7)
    assert plan.to(3).edits == blockpruner.plan(model, BATCHES, 3).edits
    assert plan.to(0.2).edits == blockpruner.plan(model, BATCHES, 0.2).edits
    assert plan.to(0.2).shares[-1] >= 0.2 > plan.to(0.2).shares[-2]
    with pytest.raises(ValueError, match="out of reach: 7 removals"):
        plan.to(8)


class Additive:
    """A stand-in for Trunk whose loss is a sum of costs of its own and of pairs, none negative: more removed never lowers it."""

    def __init__(self, model, windows):
        draw = torch.Generator().manual_seed(model.config.num_hidden_layers)
        self.alone, self.pairs = torch.rand(8, 2, generator=draw), torch.rand(8, 8, generator=draw) / 64
        self.made, self.asked, self.work = [], 0, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        Additive.last = self

    def losses(self, candidates, begin, end):
        self.asked += len(candidates) * (end - begin)
        noise = torch.randn(16, generator=torch.Generator().manual_seed(0))  # windows differ, all candidates alike
        rows = torch.stack([self._loss([*self.made, *candidate]) + noise for candidate in candidates])
        own = torch.randn(len(rows), 16, generator=torch.Generator().manual_seed(1)) / 100
        return (rows + own - own.mean(1, keepdim=True))[:, int(16 * begin) : int(16 * end)].double()

    def _loss(self, chosen):
        alone = sum(self.alone[edit.layer, ("attn", "mlp").index(edit.part)] for edit in chosen)
        return float(alone + sum(self.pairs[a.layer, b.layer] for a in chosen for b in chosen))

    def make(self, edit):
        self.made.append(edit)

    def count_naive(self, candidates):
        pass


@pytest.mark.parametrize("how", [{"lazy": True}, {"early": 4.0}, {"lazy": True, "early": 4.0}], ids=str)
def test_asking_less_finds_the_same(how, monkeypatch):
    monkeypatch.setattr(_greedy, "Trunk", Additive)
    expected = blockpruner.plan(model_of(), BATCHES, 8).edits
    every = Additive.last.asked
    assert blockpruner.plan(model_of(), BATCHES, 8, **how).edits == expected
    assert Additive.last.asked < 0.75 * every


def test_losses_by_parts_are_those_of_all_windows():
    with Trunk(model_of(), WINDOWS) as trunk:
        tried = [(Drop(layer, "mlp"),) for layer in (1, 4)]
        whole = trunk.losses(tried)
        assert whole.shape == (2, 6)
        parts = [trunk.losses(tried, begin, end) for begin, end in [(0, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 1)]]
    assert [part.shape[1] for part in parts] == [1, 2, 3]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)  # float32


def test_early_keeps_all_until_an_error_can_be_told():
    model = model_of()  # of six windows, one and three are too few to reject by
    exhaustive, early = blockpruner.plan(model, BATCHES, 3), blockpruner.plan(model, BATCHES, 3, early=1e-9)
    assert early.edits == exhaustive.edits
    with pytest.raises(ValueError, match="early counts standard errors"):
        blockpruner.plan(model, BATCHES, 3, early=-1)


@pytest.mark.parametrize("name", ["blockpruner", "sleb", "sliding_merge"])
def test_a_killed_search_goes_on(name, tmp_path):
    def killed(stage, done, of):
        if done == 3:
            raise KeyboardInterrupt

    model, plan = model_of(), structure.get(name).plan
    whole = plan(model, BATCHES, 0.4)
    with pytest.raises(KeyboardInterrupt):
        plan(model, BATCHES, 0.4, journal=Journal(tmp_path / "j", {}), progress=killed)
    assert len(list((tmp_path / "j").glob("step-*"))) >= 3
    resumed = plan(model, BATCHES, 0.4, journal=Journal(tmp_path / "j", {}))
    assert (resumed.edits, resumed.scores) == (whole.edits, whole.scores)
    assert resumed.work.evaluations < whole.work.evaluations
    assert torch.equal(model(WINDOWS).logits, model_of()(WINDOWS).logits)


PARALLEL = """
import json, sys, torch
sys.path.insert(0, {tests!r})
import test_structure as t
from dlpkit import parallel
from dlpkit.structure import blockpruner, sliding_merge
torch.set_num_threads(1)
with parallel.processes(torch.device("cpu")):
    assert parallel.count() == 2
    plans = [blockpruner.plan(t.model_of(), t.BATCHES, 4), sliding_merge.plan(t.model_of(), t.BATCHES, 3)]
    found = [[str(plan.edits), plan.scores, plan.work.evaluations] for plan in plans]
    sys.stdout.write(json.dumps(found) + "\\n")  # in one piece: two processes write to one pipe
    sys.stdout.flush()
"""


def test_two_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "search.py"
    script.write_text(PARALLEL.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line for line in out.splitlines() if line.startswith("[[")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    alone = [blockpruner.plan(model_of(), BATCHES, 4), sliding_merge.plan(model_of(), BATCHES, 3)]
    for (chosen, scores, evaluations), plan in zip(json.loads(lines[0]), alone, strict=True):
        assert chosen == str(plan.edits)
        assert scores == pytest.approx(plan.scores, abs=1e-6)
        assert evaluations == plan.work.evaluations


def test_windows_are_of_one_length():
    with pytest.raises(ValueError, match="windows of one length"):
        blockpruner.plan(model_of(), [WINDOWS[:1], WINDOWS[1:, :9]], 2)


def block_influence(model):
    arch, found = archs.of(model), []
    hidden = model(WINDOWS, output_hidden_states=True).hidden_states
    ends = []  # the last of hidden_states is behind the final norm: take what the last block gives
    handle = archs.blocks(model, arch)[-1].register_forward_hook(lambda m, a, out: ends.append(out))
    model(WINDOWS)
    handle.remove()
    for before, after in zip(hidden[:-1], [*hidden[1:-1], ends[0]], strict=True):
        found.append(1 - cosine_similarity(before, after, dim=-1).mean().item())
    return found


@torch.no_grad()
def test_shortgpt_removes_the_lowest_influence():
    model = model_of()
    expected = block_influence(model)
    plan = shortgpt.plan(model, BATCHES, 3)
    assert [edit.layer for edit in plan.edits] == sorted(range(8), key=expected.__getitem__)[:3]
    assert plan.scores == pytest.approx(sorted(expected)[:3], abs=1e-5)


@torch.no_grad()
def released_walk(model, threshold, rule):
    """The loop of the released SLM.py on deep copies, the last window committed."""

    def last(m):
        return m.base_model(WINDOWS).last_hidden_state.flatten(1)

    original, windows = last(model), []
    high = model.config.num_hidden_layers - 2
    low = high - 1
    while low >= 0:
        trial = copy.deepcopy(model)
        surgery.apply(trial, [*windows, *([Merge(low, high, rule)] if low < high else [])])
        if cosine_similarity(original, last(trial)).mean().item() > threshold:
            low -= 1
        elif low + 1 != high:
            windows.append(Merge(low + 1, high, rule))
            high = low
        else:
            high, low = high - 1, low - 1
    return windows + ([Merge(low + 1, high, rule)] if low + 1 < high else [])


@pytest.mark.parametrize("rule", edits.RULES)
@pytest.mark.parametrize("threshold", [0.9, 0.7, 0.5, 0.3, 0.0])
def test_sliding_merge_walks_as_the_released_code(rule, threshold):
    model = model_of()
    plan = sliding_merge.plan(model, BATCHES, None, rule=rule, threshold=threshold)
    assert plan.edits == released_walk(model, threshold, rule)


def test_sliding_merge_commits_the_window_that_reaches_the_bottom():
    assert sliding_merge.plan(model_of(), BATCHES, None, threshold=-1.0).edits == [Merge(0, 6)]


def test_sliding_merge_leaves_out_layers_that_lack_a_half():
    model = model_of()
    surgery.apply(model, [Drop(3, "attn")])
    assert sliding_merge.plan(model, BATCHES, None, threshold=-1.0).edits == [Merge(4, 6), Merge(0, 2)]


def test_sliding_merge_hits_a_number_of_layers():
    for count in (1, 2, 3, 5):
        plan = sliding_merge.plan(model_of(), BATCHES, count)
        assert sum(edit.high - edit.low for edit in plan.edits) == count
    with pytest.raises(ValueError, match="either a target or a threshold"):
        sliding_merge.plan(model_of(), BATCHES, 2, threshold=0.5)


LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
BLOCKPRUNER_64 = (
    "A25 A27 A24 A23 A28 A29 A8 M7 A19 A30 M22 A21 M27 A18 M21 M11 A12 A14 M14 M24"  # ppls/ of the released code
)


@pytest.fixture(scope="module")
def llama_2_7b():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA_2_7B))


def test_the_papers_ratios(llama_2_7b):
    """BlockPruner's table 1 (21.99 %), its 30.00 % and 37.02 %, and the 21.02 % of seven whole layers, from what was removed."""
    budget = structure.Budget(llama_2_7b)
    parts = {"A": "attn", "M": "mlp"}
    golden = [Drop(int(name[1:]), parts[name[0]]) for name in BLOCKPRUNER_64.split()]
    assert budget.fits(golden)
    assert 100 * budget.share(golden[:17]) == pytest.approx(21.99, abs=0.01)
    for attentions, mlps, share in [(12, 6, 24.00), (14, 8, 30.00), (15, 11, 37.02), (17, 13, 43.03)]:
        removed = [Drop(i, "attn") for i in range(attentions)] + [Drop(i, "mlp") for i in range(mlps)]
        assert 100 * budget.share(removed) == pytest.approx(share, abs=0.01)
    shortgpt_order = [27, 26, 25, 28, 24, 29, 23, 21, 22]
    layers = [Drop(layer, "layer") for layer in shortgpt_order]
    assert 100 * budget.share(layers[:7]) == pytest.approx(21.02, abs=0.01)
    assert 100 * budget.share([Merge(20, 27)]) == pytest.approx(21.02, abs=0.01)
    assert len(budget.plan(golden, [0.0] * 20, "loss").to(0.2198).edits) == 17
