import pytest
from conftest import folder_bytes

from dlpkit.folders import check_free, new_folder


def test_whole(tmp_path):
    with new_folder(tmp_path / "a" / "out") as new:
        (new / "x").write_text("12345")
        assert not (tmp_path / "a" / "out").exists()
    assert folder_bytes(tmp_path / "a" / "out") == 5
    assert len(list((tmp_path / "a").iterdir())) == 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("No space left on device"), ValueError])
def test_or_not_at_all(tmp_path, failure):
    def write():
        with new_folder(tmp_path / "out") as new:
            (new / "x").write_text("half")
            raise failure

    with pytest.raises(type(failure) if isinstance(failure, Exception) else failure):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as new:
        (new / "old").write_text("1")

    def fail():
        with new_folder(tmp_path / "out", overwrite=True):
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert (tmp_path / "out" / "old").exists()
    with new_folder(tmp_path / "out", overwrite=True) as new:
        (new / "new").write_text("2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert len(list(tmp_path.iterdir())) == 1


def test_taken_targets(tmp_path):
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_free(tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="--overwrite"):
        check_free(tmp_path)
