"""Which packages a bare Python lacks, and bringing them from a folder of wheels, without pip and without a network.

What is there is used as it is; only what is missing is unpacked, into a folder that later processes have in PYTHONPATH.
A wheel is a zip archive of what an installer would put there. Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

OF_THE_PYTHON = ("numpy", "torch", "numba", "llvmlite")
"""What cannot be brought: too large, or bound to the machine."""
ENGINE: Mapping[str, str] = {
    "annotated-types": "annotated_types",
    "click": "click",
    "donfig": "donfig",
    "google-crc32c": "google_crc32c",
    "numcodecs": "numcodecs",
    "packaging": "packaging",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "pyyaml": "yaml",
    "rich": "rich",
    "typing-extensions": "typing_extensions",
    "typing-inspection": "typing_inspection",
    "xxhash": "xxhash",
    "zarr": "zarr",
}
"""Package -> what is imported of it. Every merge needs all of these."""
CUDA: Mapping[str, str] = {"cuda-bindings": "cuda.bindings.driver", "cuda-pathfinder": "cuda.pathfinder"}
MERGEKIT: Mapping[str, str] = {
    "accelerate": "accelerate",
    "anyio": "anyio",
    "filelock": "filelock",
    "fsspec": "fsspec",
    "h11": "h11",
    "hf-xet": "hf_xet",
    "httpcore2": "httpcore2",
    "httpx2": "httpx2",
    "huggingface-hub": "huggingface_hub",
    "idna": "idna",
    "immutables": "immutables",
    "jinja2": "jinja2",
    "markupsafe": "markupsafe",
    "mergekit": "mergekit",
    "peft": "peft",
    "regex": "regex",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "truststore": "truststore",
}
"""With what releases of these need of each other; others may need less."""


def missing(packages: Mapping[str, str]) -> list[str]:
    """Those that this Python cannot import."""
    importlib.invalidate_caches()
    return [package for package, module in packages.items() if not is_there(module)]


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent is missing, or is no package
        return False


def bring(packages: Iterable[str], wheels: Path, site: Path) -> dict[str, str]:
    """Unpack the wheels of these packages into `site`, and import from there. Returns package -> name and version."""
    brought: dict[str, str] = {}
    files = sorted(wheels.glob("*.whl"), reverse=True) if wheels.is_dir() else []
    for package in packages:
        fitting = [file for file in files if normal(file.name.split("-")[0]) == package and fits(file.name)]
        if fitting:
            zipfile.ZipFile(fitting[0]).extractall(site)
            brought[package] = " ".join(fitting[0].name.split("-")[:2])
    if brought and str(site) not in sys.path:
        sys.path.append(str(site))
    return brought


def normal(name: str) -> str:
    """As an index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fits(wheel: str, version: tuple[int, int] = sys.version_info[:2]) -> bool:
    """Whether a wheel's tags are of this Python on Linux x86-64; of which glibc, its import will tell."""
    pythons, abi, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    exact, major = f"cp{version[0]}{version[1]}", f"py{version[0]}"
    linux = platforms == "any" or any(
        p.endswith("linux_x86_64") or re.search(r"manylinux.*_x86_64$", p) for p in platforms.split(".")
    )
    if abi == "abi3":
        return linux and any(p.startswith("cp3") and int(p[3:]) <= version[1] for p in pythons.split("."))
    return linux and any(p in (exact, major) for p in pythons.split(".")) and abi in ("none", exact)


def requirements(constraints: Path) -> list[str]:
    """Every package that may have to be brought, pinned as the project pins it."""
    pins = dict(
        _pin(line) for line in constraints.read_text().splitlines() if "==" in line and not line.startswith("#")
    )
    return [f"{name}=={pins[name]}" if name in pins else name for name in sorted({**ENGINE, **CUDA, **MERGEKIT})]


def _pin(line: str) -> tuple[str, str]:
    name, version = line.split("==")
    return normal(name), version.strip()


def how_to_bring(packages: Sequence[str]) -> str:
    return f"{', '.join(packages)}: not in this Python, and no wheel of it in the folder given by --wheels"
