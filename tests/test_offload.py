"""Blocks and hidden states that wait elsewhere: by copies that only clone, and between host and GPU where there is one."""

import pytest
import torch
from conftest import tiny_model

from dlpkit import archs, offload, pruning
from dlpkit.offload import Copies, Hidden, Resident


class Elsewhere(Copies):
    """Fetches a clone, as from another device, and notes what it was asked for."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.log = []

    def fetch(self, tensor):
        self.log.append("fetch")
        return tensor.clone()

    def store(self, tensor, home, after):
        self.log.append("store")
        home.copy_(tensor)


def linears(n=3):
    return torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(n))


def away(blocks, monkeypatch):
    """Blocks that all count as away from the device."""
    resident = Resident(blocks, torch.device("cpu"))
    resident.copies = Elsewhere()
    monkeypatch.setattr(resident, "_away", lambda index: list(blocks[index].parameters()))
    return resident


def test_what_changed_goes_home_and_nothing_else(monkeypatch):
    blocks = linears()
    resident, homes = away(blocks, monkeypatch), [block.weight.data_ptr() for block in blocks]
    bias = blocks[0].bias.clone()
    with resident.at(0):
        assert blocks[0].weight.data_ptr() != homes[0]
        blocks[0].weight.data.fill_(7.0)
        blocks[0].bias.data.fill_(7.0)
        resident.changed([blocks[0].weight])
        with resident.at(0):  # within itself
            assert blocks[0].weight.data_ptr() != homes[0]
        assert blocks[0].weight.data_ptr() != homes[0]
    assert [block.weight.data_ptr() for block in blocks] == homes
    assert (blocks[0].weight == 7.0).all()
    assert torch.equal(blocks[0].bias, bias)
    assert resident.copies.log.count("store") == 1


def test_the_next_block_is_fetched_once(monkeypatch):
    blocks = linears()
    resident = away(blocks, monkeypatch)
    for index in range(3):
        with resident.at(index):
            pass
    assert resident.copies.log == ["fetch"] * 6  # two tensors of each block


def test_a_failure_brings_the_block_home(monkeypatch):
    blocks = linears()
    resident, home = away(blocks, monkeypatch), blocks[1].weight.data_ptr()
    with pytest.raises(RuntimeError), resident.at(1):
        raise RuntimeError
    assert blocks[1].weight.data_ptr() == home


def test_hidden_states_come_in_order_and_can_be_replaced():
    hidden = Hidden([torch.full((2,), float(i)) for i in range(3)], torch.device("cpu"))
    for index, here in enumerate(hidden):
        hidden[index] = here + 10
    assert [t[0].item() for t in hidden] == [t[0].item() for t in hidden.held()] == [10.0, 11.0, 12.0]
    assert len(hidden) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize(("criterion", "pattern"), [("wanda", 0.5), ("ria", "2:4"), ("sparsegpt", 0.5)])
def test_where_things_wait_changes_nothing(criterion, pattern, tokens, monkeypatch):
    """A model on the GPU, one that comes block by block, and one whose hidden states wait on the host too: the same weights.

    The rotary tables of a model on the host are computed there: the last bit may differ, and with it what SparseGPT adds to a weight.
    """

    def pruned(home, share):
        monkeypatch.setattr(offload, "RESIDENT_SHARE", share)
        model = tiny_model().to(home)
        pruning.prune(model, tokens, criterion, pattern, "dlp", device="cuda")
        assert all(parameter.device.type == home for parameter in model.parameters())
        return torch.cat([linear.weight.flatten().cpu() for _, linear in archs.model_linears(model, archs.of(model))])

    expected = pruned("cuda", 0.25)
    away = pruned("cpu", 0.25)
    assert torch.equal(away == 0, expected == 0)
    torch.testing.assert_close(away, expected, rtol=1e-5, atol=1e-5)  # float32, weights of 0.1
    assert torch.equal(pruned("cpu", 0.0), away)
