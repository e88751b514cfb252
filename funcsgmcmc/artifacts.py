"""Compiled steps in a file, for processes and machines that would compile the same.

    cold    compile ─► torch's cache on this machine ─► save_compiled(path)
    later   load_compiled(path) ─► the cache of another machine ─► the first step finds its code

The file holds what `torch.compiler.save_cache_artifacts` gives, below a line that says what made
it. What was compiled for another network, shape or processor is not found, and is compiled as ever.
"""

import json
import os
import platform
from pathlib import Path

import torch

from funcsgmcmc import checks

_MAGIC = b"funcsgmcmc: compiled steps\n"


def save_compiled(path: str | os.PathLike[str]) -> None:
    """Write all that `torch.compile` has made in this process, or found in its cache, to a file.

    Args:
        path: Of the file. One that is there is replaced at once, so that others may read it.

    Raises:
        TypeError: `path` is not a path.
        RuntimeError: Nothing has been compiled in this process.
        OSError: The file cannot be written.
    """
    path = _path(path)
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        raise RuntimeError(
            "save_compiled stores what this process has compiled, got nothing: make a step with "
            "compile=True, or call a compiled function, before"
        )
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        part.write_bytes(_MAGIC + json.dumps(_maker()).encode() + b"\n" + found[0])
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_compiled(path: str | os.PathLike[str]) -> None:
    """Put what `save_compiled` wrote into torch's cache on this machine, before the first step.

    The file is code that will run: load only what you, or someone you trust, have written.

    Args:
        path: Of the file.

    Raises:
        TypeError: `path` is not a path.
        FileNotFoundError: There is no such file.
        ValueError: The file is not one of `save_compiled`, is damaged, or was written with another
            torch, Python, or kind of processor.
    """
    path = _path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file that save_compiled wrote, got {path}: none")
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise ValueError(f"path must be a file that save_compiled wrote, got {path}: another kind")
    line, _, artifacts = content.removeprefix(_MAGIC).partition(b"\n")
    damaged = f"path must be a whole file of save_compiled, got {path}: it is damaged"
    try:
        made_by, here = json.loads(line), _maker()
    except ValueError as error:
        raise ValueError(damaged) from error
    for what in here:
        if made_by.get(what) != here[what]:
            raise ValueError(
                f"path must be a file written with the same {what}, got {path}, written with "
                f"{what} {made_by.get(what)}; here it is {here[what]}"
            )
    if torch.compiler.load_cache_artifacts(artifacts) is None:
        raise ValueError(damaged)


def _maker() -> dict[str, str]:
    """What compiled code depends on, beyond what its keys in the cache say."""
    return {
        "torch": torch.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        # Its vector instructions too: code for others ends the process.
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _path(path: str | os.PathLike[str]) -> Path:
    checks.instance("path", path, str | os.PathLike)
    return Path(path)
