"""What a pruning run has finished, kept beside its output, so that a killed run goes on at the last finished block.

A step, a summary or a block is written to a temporary name and renamed, so the journal never holds half of one. The key names everything
the result depends on; a journal with another key is not touched.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

KEPT = ("key.json", "step-", "summary-", "block-", "state")  # how the names of a journal's files begin


class Journal:
    def __init__(self, folder: str | Path, key: dict, restart: bool = False):
        """Open the journal in `folder`, or start one. Raises ValueError when it belongs to another run, unless `restart`.

        A folder that holds anything but a journal is refused either way: a finished run removes its journal, folder and all.
        """
        self.folder = Path(folder)
        if self.folder.exists() and not all(path.name.startswith(KEPT) for path in self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} is in the way: it is where an unfinished run is kept, and holds something else; move it"
            )
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        key = json.loads(json.dumps(key))
        if (self.folder / "key.json").exists():
            found = json.loads((self.folder / "key.json").read_text())
            if different := sorted(name for name in key.keys() | found.keys() if key.get(name) != found.get(name)):
                raise ValueError(
                    f"{self.folder} holds an interrupted run with another {', '.join(different)}: finish that run with its own options, or add --restart"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("key.json", json.dumps(key, indent=1))

    @property
    def finished_blocks(self) -> int:
        return len(list(self.folder.glob("block-*.safetensors")))

    def step(self, index: int) -> object | None:
        """What a search found at its step `index`, or None."""
        path = self.folder / f"step-{index:05d}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def keep_step(self, index: int, found: object) -> None:
        self._write(f"step-{index:05d}.json", json.dumps(found))

    def summary(self, index: int) -> list[float] | None:
        path = self.folder / f"summary-{index:05d}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def keep_summary(self, index: int, summary: list[float]) -> None:
        self._write(f"summary-{index:05d}.json", json.dumps(summary))

    def block(self, index: int) -> dict[str, torch.Tensor] | None:
        """The pruned weights of a finished block by Linear, or None."""
        path = self.folder / f"block-{index:05d}.safetensors"
        return load_file(path) if path.exists() else None

    def keep_block(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        name = f"block-{index:05d}.safetensors"
        save_file(
            {key: weight.detach().cpu().contiguous() for key, weight in weights.items()}, self.folder / f"{name}.tmp"
        )
        os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def state(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """The tensors and facts of the last `keep_state`, or None."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118

    def keep_state(self, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """Keep how far a run has come that has no blocks to finish: one file, so its tensors and facts are of one moment."""
        path = self.folder / "state.safetensors.tmp"
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            path,
            {"facts": json.dumps(facts)},
        )
        os.replace(path, self.folder / "state.safetensors")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, text: str) -> None:
        (self.folder / f"{name}.tmp").write_text(text)
        os.replace(self.folder / f"{name}.tmp", self.folder / name)
