"""What a report of a bug should say."""

import subprocess
import sys

import tensordict
import torch

import funcsgmcmc as fs
from funcsgmcmc import info


def test_it_prints_versions_devices_compiler_and_caches():
    command = [sys.executable, "-W", "ignore", "-m", "funcsgmcmc.info"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    said = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert said["funcsgmcmc"].startswith(fs.__version__)
    assert said["torch"] == torch.__version__
    assert said["tensordict"] == tensordict.__version__
    assert said["devices"].startswith("cpu")
    assert {"python", "compat", "threads", "compiler", "triton", "cache"} <= set(said)


def test_what_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info.info()["compiler"] == "none: compile=True will fail on a CPU"
    assert info._version("no such package") == "not installed"
