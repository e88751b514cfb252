"""The launch scripts of `examples/scaling`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import funcsgmcmc as fs

SCALING = Path(__file__).parents[1] / "examples" / "scaling"
BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sh"])
def test_scripts_are_bash(name):
    subprocess.run([str(BASH), "-n", SCALING / name], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_torchrun_is_the_run_of_one_process(tmp_path):
    """On loopback: the record of two processes is that of one."""
    root = SCALING.parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        # Where torchrun lies beside this Python.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    printed = []
    commands = [sys.executable, SCALING / "chains.py"], [str(BASH), SCALING / "torchrun.sh", "2"]
    for number, command in enumerate(commands, 1):
        store = tmp_path / f"{number}.zarr"
        ended = subprocess.run(
            [*command, "--store", store, "--draws", "20"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        printed.append(ended.stdout)
    assert printed[0] == printed[1]
    one, two = (fs.open_run(tmp_path / f"{number}.zarr") for number in (1, 2))
    assert one.losses.equal(two.losses)
