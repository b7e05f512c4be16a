import pytest
import torch

from dlpkit.journal import Journal


def test_what_was_kept_comes_back(tmp_path):
    Journal(tmp_path / "j", {"seed": 0}).keep_summary(3, [1.5, 0.1 + 0.2])
    Journal(tmp_path / "j", {"seed": 0}).keep_block(2, {"a.b": torch.tensor([[1.0, -0.0]], dtype=torch.bfloat16)})
    journal = Journal(tmp_path / "j", {"seed": 0})
    assert journal.summary(3) == [1.5, 0.1 + 0.2]
    assert journal.block(2)["a.b"].view(torch.int16).tolist() == [[16256, -32768]]
    assert (journal.summary(0), journal.block(0), journal.finished_blocks) == (None, None, 1)


def test_a_state_is_the_last_one_kept(tmp_path):
    journal = Journal(tmp_path / "j", {})
    assert journal.state() is None
    for step in (1, 2):
        journal.keep_state({"w": torch.full((2,), float(step))}, {"step": step})
    tensors, facts = Journal(tmp_path / "j", {}).state()
    assert (tensors["w"].tolist(), facts) == ([2.0, 2.0], {"step": 2})


def test_another_run_is_not_touched_unless_restarted(tmp_path):
    Journal(tmp_path / "j", {"seed": 0, "text": "a"}).keep_summary(0, [1.0])
    with pytest.raises(ValueError, match="another seed: finish that run"):
        Journal(tmp_path / "j", {"seed": 1, "text": "a"})
    assert Journal(tmp_path / "j", {"seed": 0, "text": "a"}).summary(0) == [1.0]
    assert Journal(tmp_path / "j", {"seed": 1, "text": "a"}, restart=True).summary(0) is None


def test_half_written_files_do_not_count(tmp_path):
    journal = Journal(tmp_path / "j", {})
    (tmp_path / "j" / "block-00000.safetensors.tmp").write_bytes(b"half")
    assert journal.block(0) is None
    assert journal.finished_blocks == 0


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_else_is_never_taken(restart, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is in the way"):
        Journal(tmp_path / "out.partial", {}, restart)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()
