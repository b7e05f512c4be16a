"""What is in a model folder, and what will run on this machine: read from headers and versions, without loading a model."""

import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from dlpkit import report
from dlpkit.checkpoint import METHOD
from dlpkit.kernels import dispatch, formats
from dlpkit.kernels.runtime import default_device
from dlpkit.packing import sparse_linears

ROWS_OF_X = (1, 8, 16, 64, 256, 2048, 8192)  # a token of so many sequences, or a prompt of so many tokens


def inspect(folder: str | Path) -> dict:
    """What a model folder holds, from its config and file headers. linears: name, shape, kept, sparsity, bytes of each packed Linear.
    edits: the halves of layers that are gone or sliced.

    Raises ValueError when the folder is not a model, or when a file is damaged.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a model folder: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file")
    headers: dict[str, tuple[list[int], str]] = {}
    for file in files:
        headers |= _header(file)
    ours = config.get("quantization_config") or {}
    if ours.get("quant_method") != METHOD:
        ours = {}
    modules = ours.get("modules", {})
    return {
        "model_type": config.get("model_type"),
        "packed": bool(modules),
        "edits": ours.get("edits", []),
        "files": {file.name: file.stat().st_size for file in files},
        "tensors": len(headers),
        "linears": [_linear(name, modules[name], headers) for name in sorted(modules, key=_numbered)],
    }


def doctor() -> dict:
    """Versions, device, and which format packed weights would run in here, with the reason."""
    device = default_device()
    wins, reason = dispatch.available(device)
    return {
        **report.versions(),
        "device": str(device),
        "sparse kernels": "yes" if wins else "no",
        "because": reason,
        "formats": ", ".join(formats.names()),
    }


def kernels(model: nn.Module) -> list[dict]:
    """Which kernel multiplies each kind of packed Linear of a loaded model by how many rows of x, and why, as the dispatcher has it.

    Linears of one path within their blocks, one shape and one format are a kind. A fused Linear is the whole weight it shares.
    kernels: [fewest rows of ROWS_OF_X, most, kernel, reason] where kernel and reason are the same.
    """
    found: dict[tuple, dict] = {}
    for name, sparse in sparse_linears(model).items():
        packed = sparse.whole
        kind = re.sub(r"\.\d+\.", ".*.", name), sparse.format, packed.shape
        if kind not in found:
            by_choice = itertools.groupby(ROWS_OF_X, partial(dispatch.explain, packed))
            chosen = [(choice, list(rows)) for choice, rows in by_choice]
            found[kind] = {"linears": kind[0], "format": sparse.format, "shape": list(packed.shape), "count": 0}
            found[kind]["kernels"] = [[rows[0], rows[-1], *choice] for choice, rows in chosen]
        found[kind]["count"] += 1
    return list(found.values())


def _header(file: Path) -> dict[str, tuple[list[int], str]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: ((view := tensors.get_slice(name)).get_shape(), view.get_dtype()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged or incomplete: {error}") from error


def _linear(name: str, facts: list[int], headers: dict[str, tuple[list[int], str]]) -> dict:
    try:
        N, K, nnz = facts
        expected = {"weight": [nnz], "weight_mask": [N, -(-K // 8)], "weight_offsets": [N + 1]}
        found = {part: headers[f"{name}.{part}"] for part in expected}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"config.json names the packed Linear {name}, but its tensors are not all there; the folder is damaged"
        ) from error
    if wrong := [part for part in expected if found[part][0] != expected[part]]:
        raise ValueError(
            f"{name}.{wrong[0]} has shape {found[wrong[0]][0]}, config.json says {expected[wrong[0]]}; the folder is damaged"
        )
    size = sum(_bytes_of(dtype) * math.prod(shape) for shape, dtype in found.values())
    return {
        "name": name,
        "shape": [N, K],
        "kept": nnz,
        "sparsity": 1 - nnz / (N * K),
        "bytes": size,
        "dense_bytes": N * K * _bytes_of(found["weight"][1]),
    }


def _numbered(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.9 before layers.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _bytes_of(dtype: str) -> int:
    """Bytes per element of a safetensors dtype such as BF16, U8 or F8_E4M3."""
    return int(re.search(r"\d+", dtype)[0]) // 8
