"""Runs killed at random moments, also while they write, and resumed: bit for bit the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are made by forking")
@pytest.mark.parametrize("number", range(40))
def test_a_killed_run_is_resumed_to_the_same_end(number, tmp_path):
    """Every sampler; tensors, a list and a stateful loader; vmap, loop and compiled."""
    script = Path(__file__).with_name("killed.py")
    answer = subprocess.run(
        [sys.executable, script, tmp_path, str(number), str(number + 1)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split()[-2] == "same", answer.stdout
