"""The models that the merges read: base and experts in the shapes of TinyLlama-1.1B, by `benchmarks.checkpoints`.

Fewer layers where the disk has no room for the inputs and what stands beside them, or is too slow for them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import torch

from benchmarks.checkpoints import Family, write_family
from benchmarks.device.parts import Bench, Skip, Teller
from benchmarks.shapes import SHAPES

NAME, DTYPE, ITEM_BYTES, EXPERTS = "tinyllama-1.1b", "bfloat16", 2, 3
BESIDE = 4
"""Models of output at a time: the one being written, the one it replaces, one to compare with, `merges`' last."""
SPARE_BYTES = 1 << 30
PROBE_BYTES = 1 << 29
PIECE = 1 << 24
SHARE = 0.5
"""Of the part's time, for what goes to disk by the rate of a first file; the rest is for making it up."""


def run(bench: Bench, tell: Teller) -> None:
    shapes = SHAPES[NAME]
    wanted = bench.scale.layers or shapes.layers
    free = shutil.disk_usage(bench.scratch).free - SPARE_BYTES
    rate = writing_rate(bench.scratch / "probe.bin")
    tell.note(f"writing and syncing {PROBE_BYTES >> 20} MiB: {rate / 1e9:.2f} GB/s")

    def fits(layers: int) -> bool:
        model = shapes.scaled(layers=layers, divide=bench.scale.divide).elements * ITEM_BYTES
        inputs = model * (1 + EXPERTS)
        return inputs + model * BESIDE <= free and inputs <= SHARE * bench.seconds_left * rate

    layers = next((n for n in range(wanted, 0, -1) if fits(n)), 0)
    if layers < wanted:
        room = f"the disk has {free / 1e9:.1f} GB free and takes {rate / 1e9:.2f} GB/s"
        if not layers:
            raise Skip(f"{room}: too little for one layer")
        tell.skipped(f"{wanted - layers} of {wanted} layers", room)
    torch.set_num_threads(1)  # blocks are small
    began = time.monotonic()
    found = write(bench.scratch / "models", layers, bench.scale.divide)
    width = f", widths divided by {bench.scale.divide}" if bench.scale.divide > 1 else ""
    tell.note(
        f"base and {EXPERTS} experts in the shapes of {NAME}, {layers} of {shapes.layers} layers{width}: "
        f"{found.parameters:,} parameters each, {DTYPE}, {found.input_bytes / 1e9:.2f} GB, written and synced in "
        f"{time.monotonic() - began:.0f} s"
    )
    (bench.scratch / "models.json").write_text(json.dumps({"layers": layers, "divide": bench.scale.divide}))


def writing_rate(file: Path) -> float:
    """Bytes a second, written and synced."""
    piece, began = os.urandom(PIECE), time.monotonic()
    with open(file, "wb", buffering=0) as stream:
        for _ in range(PROBE_BYTES // PIECE):
            stream.write(piece)
        os.fsync(stream.fileno())
    seconds = time.monotonic() - began
    file.unlink()
    return PROBE_BYTES / seconds


def family(scratch: Path) -> Family:
    """What `run` wrote."""
    return write(scratch / "models", **json.loads((scratch / "models.json").read_text()))


def write(folder: Path, layers: int, divide: int) -> Family:
    """Models of so many layers; those that stand there already are taken as they are."""
    shapes = SHAPES[NAME].scaled(layers=layers, divide=divide)
    return write_family(folder, shapes.tensors, experts=EXPERTS, dtype=DTYPE, config=shapes.config(DTYPE))
