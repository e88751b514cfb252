"""What a report of a bug should say: `python -m funcsgmcmc.info`.

Versions, devices, compiler and caches, one a line. It sends nothing anywhere, and names no
environment variable but those that steer threads, allocator and compiler.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

import funcsgmcmc

_PACKAGES = (
    "torch",
    "tensordict",
    "numpy",
    "scipy",
    "arviz-base",
    "arviz-stats",
    "matplotlib",
    "tqdm",
    "transformers",
    "xarray",
    "zarr",
    "hypothesis",
    "devinterp",
)
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHINDUCTOR_CACHE_DIR",
    "CXX",
)


def info() -> dict[str, str]:
    """Name to value of everything that a report of a bug should say."""
    return {
        "funcsgmcmc": f"{funcsgmcmc.__version__}, {Path(funcsgmcmc.__file__).parent}",
        "compat": _compat(),
        "python": f"{platform.python_version()}, {platform.platform()}",
        **{name: _version(name) for name in _PACKAGES},
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "devices": ", ".join(_devices()),
        "compiler": _compiler(),
        "triton": _version("triton"),
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "cache": _cache(),  # last: torch writes the folder into the environment when it is asked
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _compat() -> str:
    """Which package `import compat` finds: another one may be in its place."""
    found = importlib.util.find_spec("compat")
    origin = Path(found.origin) if found is not None and found.origin else None
    if origin is None:
        return "not found: use funcsgmcmc.compat"
    package = Path(funcsgmcmc.__file__).parent
    if origin.parent in (package / "compat", package.parent / "compat"):
        return "funcsgmcmc.compat"
    return f"another package, {origin}: use funcsgmcmc.compat"


def _devices() -> list[str]:
    devices = range(torch.cuda.device_count())
    cuda = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in devices]
    return ["cpu", *cuda, *["mps"] * torch.backends.mps.is_available()]


def _compiler() -> str:
    """The C++ compiler that `torch.compile` will call on a CPU."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return "none: compile=True will fail on a CPU"
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: {error}"
    return f"{path}: {said.stdout.partition(chr(10))[0]}"


def _cache() -> str:
    """Where compiled steps are kept, and how many files are there."""
    folder = cache_dir()
    return f"{folder}, {sum(len(files) for *_, files in os.walk(folder))} files"


if __name__ == "__main__":
    for name, value in info().items():
        print(f"{name:24} {value}")
