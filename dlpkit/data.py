"""Text -> token windows, the same for the same seed: built-in offline text, local files, Hugging Face datasets by name.

The papers' conventions: calibration windows are random crops of long documents (C4) or random slices of one long text; evaluation
windows lie end to end without overlap and the rest is left out. The order of random draws is that of the released Wanda and
SparseGPT code, so seed 0 crops what theirs crops.
"""

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

BUILTIN = "builtin"
EVALUATION_EVERY = 3  # of the built-in text, every third topic is kept for evaluation
CROP_TRIES = 10_000  # documents looked at for one that is longer than a window
SUFFIXES = (".txt", ".raw", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Text:
    """Documents, what joins them into one text, and whether calibration crops single documents instead of the joined text."""

    documents: Sequence[str]
    joint: str
    crop: bool = False


@dataclass(frozen=True)
class HubSet:
    """A Hugging Face dataset with the conventions that papers use on it."""

    path: str
    splits: tuple[str, str]  # calibration, evaluation
    joint: str
    config: str | None = None
    files: tuple[str, str] | None = None  # calibration, evaluation: single shards of what is large
    field: str = "text"
    crop: bool = False
    documents: int | None = None  # of the evaluation split, the first so many
    revision: str | None = None


HUB_SETS = {
    "wikitext2": HubSet(
        "Salesforce/wikitext",
        ("train", "test"),
        "\n\n",
        config="wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    ),
    "c4": HubSet(
        "allenai/c4",
        ("train", "validation"),
        " ",
        files=("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
        crop=True,
        documents=1100,
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    ),
    "ptb": HubSet(
        "ptb-text-only/ptb_text_only", ("train", "test"), " ", field="sentence", revision="refs/convert/parquet"
    ),
    "slimpajama": HubSet("DKYoon/SlimPajama-6B", ("train", "validation"), "\n\n", crop=True, documents=1100),
    "alpaca": HubSet(
        "tatsu-lab/alpaca", ("train", "train"), "\n\n", revision="dce01c9b08f87459cf36a430d809084718273017"
    ),
}


def calibration(tokenizer, source: str = BUILTIN, n: int = 128, seqlen: int = 2048, seed: int = 0) -> torch.Tensor:
    """`n` random windows of `seqlen` tokens -> [n, seqlen] int64. Raises ValueError for a text that is too short."""
    if n < 1 or seqlen < 2:
        raise ValueError(f"calibration wants at least one window of two tokens, got {n} windows of {seqlen}")
    text, draw = read(source, "calibration", tokenizer), random.Random(seed)
    if text.crop:
        return torch.stack([_crop(tokenizer, text, seqlen, draw, source) for _ in range(n)])
    ids = _tokens(tokenizer, text.joint.join(text.documents))
    if len(ids) <= seqlen:
        raise ValueError(
            f"{source} has {len(ids)} tokens, fewer than one window of {seqlen}: use more text or a smaller seqlen"
        )
    starts = [draw.randint(0, len(ids) - seqlen - 1) for _ in range(n)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


def evaluation(tokenizer, source: str = BUILTIN, seqlen: int = 2048, limit: int | None = None) -> torch.Tensor:
    """Windows that lie end to end -> [W, seqlen] int64, at most `limit`. Raises ValueError for a text shorter than one window."""
    if seqlen < 2 or (limit is not None and limit < 1):
        raise ValueError(
            f"evaluation wants windows of two tokens or more and a limit of at least one, got seqlen {seqlen}, limit {limit}"
        )
    text = read(source, "evaluation", tokenizer)
    ids = _tokens(tokenizer, text.joint.join(text.documents))
    count = min(len(ids) // seqlen, limit or len(ids))
    if not count:
        raise ValueError(
            f"{source} has {len(ids)} tokens, fewer than one window of {seqlen}: use more text or a smaller seqlen"
        )
    return ids[: count * seqlen].view(count, seqlen)


def training(
    tokenizer, source: str = BUILTIN, n: int = 1024, seqlen: int = 512, held_out: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The calibration part of a text cut end to end -> at most `n` windows to train on and the `held_out` before them, [W, seqlen] each.

    Raises ValueError for a text too short to leave one window to train on.
    """
    if n < 1 or held_out < 1 or seqlen < 2:
        raise ValueError(
            f"training wants at least one window to train on, one held out and two tokens in each, got {n}, {held_out} and {seqlen}"
        )
    text, parts, count = read(source, "calibration", tokenizer), [], 0
    for document in text.documents:
        parts.append(_tokens(tokenizer, document + text.joint))
        count += len(parts[-1])
        if count >= (n + held_out) * seqlen:
            break
    windows = torch.cat(parts)[: min(count // seqlen, n + held_out) * seqlen].view(-1, seqlen)
    if len(windows) <= held_out:
        raise ValueError(
            f"{source} has {count} tokens, too few to hold out {held_out} windows of {seqlen} and train on others: use more text"
        )
    return windows[held_out:], windows[:held_out]


def fingerprint(windows: torch.Tensor) -> str:
    """First 16 hex digits of the SHA-256 of the token ids: two runs with the same one saw the same text."""
    return hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:16]


def read(source: str, part: str, tokenizer=None) -> Text:
    """The `part` ("calibration" or "evaluation") of a source: "builtin", a file, or the name of a Hugging Face dataset.

    A file serves both parts as it is. `.jsonl` holds one object with a "text" a line; its documents are joined by the tokenizer's
    end-of-text token. `.raw` is WikiText's own layout, one row a line, joined by blank lines as the papers do.
    """
    if source == BUILTIN:
        return _builtin(part)
    if source in HUB_SETS:
        return _from_hub(HUB_SETS[source], part)
    path = Path(source)
    if not source.endswith(SUFFIXES):
        raise ValueError(
            f"unknown text {source!r}: choose {BUILTIN}, a dataset ({', '.join(HUB_SETS)}) or a file that ends in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise ValueError(f"no text file at {path}")
    if source.endswith(".txt"):
        text = Text([path.read_text(encoding="utf-8")], "")
    elif source.endswith(".raw"):
        with path.open(encoding="utf-8", newline="\n") as lines:
            text = Text([line if line.strip() else "" for line in lines], "\n\n")
    else:
        text = Text(_json_lines(path), getattr(tokenizer, "eos_token", None) or "\n\n")
    if not any(document.strip() for document in text.documents):
        raise ValueError(f"{path} holds no text")
    return text


def _builtin(part: str) -> Text:
    """Topics repeat each other's paragraphs, so the evaluation part leaves out those that the calibration part has."""
    from pydoc_data.topics import topics

    ordered = [topics[name].split("\n\n") for name in sorted(topics)]
    kept_back = dict.fromkeys(chain.from_iterable(ordered[::EVALUATION_EVERY]))
    calibration = dict.fromkeys(chain.from_iterable(topic for i, topic in enumerate(ordered) if i % EVALUATION_EVERY))
    if part == "calibration":
        return Text(list(calibration), "\n\n")
    return Text([paragraph for paragraph in kept_back if paragraph not in calibration], "\n\n")


def _json_lines(path: Path) -> list[str]:
    documents, opener = [], gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                documents.append(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: wants an object with a "text", as in {{"text": "..."}}'
                ) from error
    return documents


def _from_hub(hub: HubSet, part: str) -> Text:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("named datasets need the package datasets: pip install 'dlpkit[eval]'") from error
    which = ("calibration", "evaluation").index(part)
    split = hub.splits[which]
    files = {split: hub.files[which]} if hub.files else None
    rows = datasets.load_dataset(hub.path, hub.config, data_files=files, split=split, revision=hub.revision)
    if part == "evaluation" and hub.documents:
        rows = rows.select(range(min(hub.documents, len(rows))))
    return Text(rows[hub.field], hub.joint, hub.crop)


def _crop(tokenizer, text: Text, seqlen: int, draw: random.Random, source: str) -> torch.Tensor:
    """Random documents until one is longer than a window, then a random window of it."""
    for _ in range(CROP_TRIES):
        ids = _tokens(tokenizer, text.documents[draw.randint(0, len(text.documents) - 1)])
        if len(ids) > seqlen:
            start = draw.randint(0, len(ids) - seqlen - 1)
            return ids[start : start + seqlen]
    raise ValueError(f"{source} has hardly any document longer than {seqlen} tokens: use a smaller seqlen")


def _tokens(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
