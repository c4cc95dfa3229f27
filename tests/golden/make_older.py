"""Made `older.zip`, with the code of commit b88e317: what version 0.1.0 left in three OUTs, and the inputs it had.

`python make_older.py FOLDER` writes a job of a base and two experts in four shards into FOLDER, with `done`, a finished
merge; `half`, one that was stopped when two of its four units were journalled; `named`, one that was stopped when two
of its shards had their names. The archive keeps no times: who unpacks it gives the inputs those in `plan.json`.
"""

from __future__ import annotations

import json
import sys
import threading
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import ties_dist
from ties_dist import passes  # type: ignore[attr-defined]
from ties_dist.storage.local import LocalWriter


def checkpoint(folder: Path, which: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "drill"}')
    weight_map = {}
    for shard in range(4):
        i = np.arange(shard * 999, shard * 999 + 600, dtype=np.int64)
        values = (i * 40503 % 257 - 128) + (i * 977 * (which + 1) % 33 - 16 if which else 0)
        file, name = f"model-{shard + 1:05d}-of-00004.safetensors", f"layers.{shard}.weight"
        save_file({name: torch.from_numpy(values / 64).to(torch.bfloat16).reshape(24, 25)}, folder / file)
        weight_map[name] = file
    index = {"metadata": {"total_size": 4 * 1200}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main(folder: Path) -> None:
    for which, name in enumerate(("base", "expert-0", "expert-1")):
        checkpoint(folder / name, which)
    models = [{"model": "expert-0"}, {"model": "expert-1"}]
    recipe: dict[str, Any] = {"merge_method": "ties", "base_model": "base", "models": models}
    (folder / "recipe.yml").write_text(json.dumps({**recipe, "parameters": {"density": 0.3}}))
    passes.COMMIT_SECONDS = -1.0
    print(ties_dist.merge(folder / "recipe.yml", folder / "done", kernel="eager", threads=1).output_digest)

    stop, written, write, replace = threading.Event(), [0], LocalWriter.write, Path.replace

    def stopping(self: LocalWriter, *given: Any) -> None:
        written[0] += 1
        if written[0] == 2:
            stop.set()
        write(self, *given)

    def failing(self: Path, target: Path) -> Path:
        if self.parent.name == "parts" and self.name.startswith("model-00003"):
            raise ties_dist.OutputError("the disk is gone.")
        return replace(self, target)

    LocalWriter.write = stopping  # type: ignore[method-assign]
    with suppress(ties_dist.StoppedError):
        ties_dist.merge(folder / "recipe.yml", folder / "half", kernel="eager", threads=1, stop=stop)
    LocalWriter.write, Path.replace = write, failing  # type: ignore[method-assign, assignment]
    with suppress(ties_dist.OutputError):
        ties_dist.merge(folder / "recipe.yml", folder / "named", kernel="eager", threads=1)
    with zipfile.ZipFile(Path(__file__).with_name("older.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
