import gzip
import random
import sys
import types

import pytest
import torch

from dlpkit import data


def test_windows_are_seeded_and_recorded_by_a_fingerprint(tokenizer):
    a, b, c = (data.calibration(tokenizer, n=4, seqlen=32, seed=seed) for seed in (0, 0, 1))
    assert a.shape == (4, 32)
    assert a.dtype == torch.int64
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert data.fingerprint(a) == data.fingerprint(b) != data.fingerprint(c)


def test_builtin_parts_do_not_overlap():
    parts = [set(data.read("builtin", part).documents) for part in ("calibration", "evaluation")]
    assert not parts[0] & parts[1]
    assert min(sum(map(len, part)) for part in parts) > 20_000  # characters


def test_slices_are_those_of_the_released_code(tokenizer, tmp_path):
    """random.seed(seed), then randint(0, tokens - seqlen - 1) per window."""
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(3).choices("abcdef \n", k=500)))
    ids = tokenizer(path.read_text())["input_ids"]
    random.seed(7)
    starts = [random.randint(0, len(ids) - 16 - 1) for _ in range(5)]
    assert data.calibration(tokenizer, str(path), 5, 16, 7).tolist() == [ids[s : s + 16] for s in starts]


def test_evaluation_windows_lie_end_to_end(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijk")
    windows = data.evaluation(tokenizer, str(path), 4)
    assert tokenizer.batch_decode(windows) == ["abcd", "efgh"]
    assert len(data.evaluation(tokenizer, str(path), 4, limit=1)) == 1


def test_training_windows_follow_those_held_out(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmno")
    windows, held_out = data.training(tokenizer, str(path), 9, 4, 1)
    assert (tokenizer.batch_decode(held_out), tokenizer.batch_decode(windows)) == (["abcd"], ["efgh", "ijkl"])
    assert tokenizer.batch_decode(data.training(tokenizer, str(path), 1, 4, 1)[0]) == ["efgh"]
    with pytest.raises(ValueError, match="15 tokens, too few to hold out 3 windows of 4"):
        data.training(tokenizer, str(path), 9, 4, 3)
    with pytest.raises(ValueError, match="at least one window to train on"):
        data.training(tokenizer, str(path), 0, 4, 1)


def test_training_reads_no_more_documents_than_it_needs(tokenizer, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "abc"}\n' * 100)
    windows, held_out = data.training(tokenizer, str(path), 2, 8, 1)
    joined = (tokenizer("abc")["input_ids"] + [tokenizer.eos_token_id]) * 6
    assert torch.cat([held_out, windows]).flatten().tolist() == joined


def test_raw_wikitext_is_joined_by_blank_lines(tmp_path, tokenizer):
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n \n Some text . \n", newline="\n")
    text = data.read(str(path), "evaluation")
    assert text.joint.join(text.documents) == "\n\n = Title = \n\n\n\n\n Some text . \n"


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz"])
def test_json_lines_are_joined_by_the_end_of_text_token(name, tmp_path, tokenizer):
    opener = gzip.open if name.endswith("gz") else open
    with opener(tmp_path / name, "wt") as out:
        out.write('{"text": "ab"}\n\n{"text": "cd"}\n')
    windows = data.evaluation(tokenizer, str(tmp_path / name), 5)
    assert windows.tolist() == [[*tokenizer("ab")["input_ids"], tokenizer.eos_token_id, *tokenizer("cd")["input_ids"]]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", "  \n ", "holds no text"),
        ("a.txt", "short", "has 5 tokens, fewer than one window of 16"),
        ("a.jsonl", '{"text": "x"}\n{"body": 1}', r'line 2: wants an object with a "text"'),
        ("a.jsonl", "{broken", "line 1"),
        ("a.pdf", "x", "unknown text"),
    ],
)
def test_bad_texts_say_what_is_wrong(name, content, message, tmp_path, tokenizer):
    path = tmp_path / name
    path.write_text(content)
    for read in (
        lambda: data.calibration(tokenizer, str(path), 2, 16),
        lambda: data.evaluation(tokenizer, str(path), 16),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_missing_and_unknown_texts(tokenizer):
    with pytest.raises(ValueError, match="no text file at"):
        data.calibration(tokenizer, "nowhere.txt")
    with pytest.raises(ValueError, match=r"choose builtin, a dataset \(wikitext2, c4"):
        data.calibration(tokenizer, "wikitext3")
    with pytest.raises(ValueError, match="at least one window"):
        data.calibration(tokenizer, "builtin", n=0)


class Rows:
    """What dlpkit uses of a datasets.Dataset."""

    def __init__(self, texts):
        self.texts = texts

    def __getitem__(self, field):
        assert field == "text"
        return self.texts

    def __len__(self):
        return len(self.texts)

    def select(self, indices):
        return Rows([self.texts[i] for i in indices])


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets that records how it was asked."""
    asked = []

    def load_dataset(path, config, **how):
        asked.append({"path": path, "config": config, **how})
        return Rows(["short", "x" * 300, "tiny", "y" * 200])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_c4_is_cropped_from_long_documents(hub, tokenizer):
    windows = data.calibration(tokenizer, "c4", 3, 64, seed=0)
    draw, expected = random.Random(0), []
    documents = ["short", "x" * 300, "tiny", "y" * 200]
    while len(expected) < 3:
        document = documents[draw.randint(0, 3)]
        if len(document) > 64:
            start = draw.randint(0, len(document) - 64 - 1)
            expected.append(document[start : start + 64])
    assert tokenizer.batch_decode(windows) == expected
    assert hub[0]["path"] == "allenai/c4"
    assert hub[0]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert len(hub[0]["revision"]) == 40


def test_wikitext2_is_joined_by_blank_lines(hub, tokenizer):
    windows = data.evaluation(tokenizer, "wikitext2", 9)
    assert tokenizer.decode(windows[0]) == "short\n\nxx"
    assert hub[0] | {"revision": None} == {
        "path": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "data_files": None, "split": "test", "revision": None,
    }  # fmt: skip


def test_no_document_is_long_enough(hub, tokenizer):
    with pytest.raises(ValueError, match="hardly any document longer than 5000 tokens"):
        data.calibration(tokenizer, "c4", 1, 5000)


def test_without_the_package_datasets(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install 'dlpkit\\[eval\\]'"):
        data.calibration(tokenizer, "c4")
