"""What machine this is, and whether it has a GPU that merges can use."""

from __future__ import annotations

import shutil
from importlib import metadata
from typing import Any

import torch

from benchmarks.device.gpu import ask, first_gpu, open_driver
from benchmarks.device.parts import Bench, Skip, Teller
from benchmarks.measure import available_bytes, machine

PACKAGES = ("llvmlite", "cuda-bindings", "pydantic", "zarr", "mergekit")


def run(bench: Bench, tell: Teller) -> None:
    found = machine(bench.scratch) | {name: _version(name) for name in PACKAGES}
    found["free disk"] = f"{shutil.disk_usage(bench.scratch).free / 2**30:.0f} GiB"
    found["free memory"] = f"{available_bytes() / 2**30:.0f} GiB"
    found["torch sees"] = f"{torch.cuda.device_count()} GPUs"
    for name, value in found.items():
        tell.note(f"{name}: {value}")
    for threads in bench.scale.threads:
        if threads > bench.cores:
            tell.skipped(f"merges by {threads} threads", f"{bench.cores} cores")
    try:
        driver = open_driver(bench)
    except Skip as why:
        tell.figure("gpus", 0)
        tell.skipped("everything on a GPU", str(why))
        return
    tell.figure("gpus", ask(driver.cuDeviceGetCount()))
    tell.note(f"GPU: {_describe(driver)}")


def _describe(driver: Any) -> str:
    with first_gpu(driver) as device:
        name = ask(driver.cuDeviceGetName(100, device)).split(b"\0")[0].decode()
        processors = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        count = ask(driver.cuDeviceGetAttribute(processors, device))
        memory = ask(driver.cuDeviceTotalMem(device))
    version = ask(driver.cuDriverGetVersion())
    of_driver = f"driver for CUDA {version // 1000}.{version % 1000 // 10}"
    return f"{name}, {count} processors, {memory / 2**30:.0f} GiB; {of_driver}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
