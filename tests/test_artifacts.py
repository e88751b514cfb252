"""Compiled steps in files: found by another process with an empty cache, and refused by name."""

import json
import os
import subprocess
import sys

import pytest
import torch

from funcsgmcmc import artifacts
from funcsgmcmc.artifacts import load_compiled, save_compiled

PROGRAM = """
import sys, torch
import funcsgmcmc as fs
from torch._dynamo.utils import counters
action, path = sys.argv[1:]
if action == "load":
    fs.artifacts.load_compiled(path)
sampler = fs.sgld(1e-2, nbeta=10.0, localization=1.0)
step = fs.compiled(fs.kernel(sampler, lambda params, batch: (params["w"] - batch).square().sum()))
state, _ = step(sampler.init({"w": torch.zeros(5)}), torch.ones(5), fs.key(0))
print(counters["inductor"]["fxgraph_cache_hit"], state.params["w"].tolist())
if action == "save":
    fs.artifacts.save_compiled(path)
"""


@pytest.mark.slow
def test_another_process_finds_what_was_compiled(tmp_path):
    """With a cache of its own, as on another machine: the same step, which is not compiled."""

    def run(action, cache):
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, action, tmp_path / "steps"]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return found.stdout.split(maxsplit=1)

    hits, first = run("save", "one")
    assert hits == "0"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "steps"}
    assert run("load", "other") == ["1", first]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A file of what is no code at all."""
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"no code", None))
    save_compiled(tmp_path / "steps")
    return tmp_path / "steps"


def test_nothing_compiled_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(RuntimeError, match="what this process has compiled, got nothing"):
        save_compiled(tmp_path / "steps")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(written, monkeypatch):
    save_compiled(written)
    assert [path.name for path in written.parent.iterdir()] == ["steps"]
    loaded = []
    monkeypatch.setattr(
        torch.compiler, "load_cache_artifacts", lambda code: loaded.append(code) or 1
    )
    load_compiled(str(written))
    assert loaded == [b"no code"]


@pytest.mark.parametrize("what", ["torch", "Python", "processor"])
def test_another_maker_is_refused(what, written, monkeypatch):
    here = artifacts._maker()
    monkeypatch.setattr(artifacts, "_maker", lambda: here | {what: "9.9"})
    with pytest.raises(ValueError, match=rf"same {what}, got .*steps.* here it is 9\.9"):
        load_compiled(written)


def test_other_vector_instructions_are_refused(written, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    with pytest.raises(ValueError, match=r"same processor, .* here it is .*AVX9"):
        load_compiled(written)


def test_bad_files_are_refused(written):
    with pytest.raises(FileNotFoundError, match="path must be a file that save_compiled wrote"):
        load_compiled(written.with_name("none"))
    with pytest.raises(ValueError, match="it is damaged"):
        load_compiled(written)
    written.write_bytes(written.read_bytes()[:40])
    with pytest.raises(ValueError, match="it is damaged"):
        load_compiled(written)
    for content in (b"", json.dumps({"a": 1}).encode()):
        written.write_bytes(content)
        with pytest.raises(ValueError, match="another kind"):
            load_compiled(written)


@pytest.mark.parametrize("function", [save_compiled, load_compiled])
@pytest.mark.parametrize("value", [None, 3, b"steps", []])
def test_bad_paths_are_refused(function, value):
    with pytest.raises(TypeError, match="path must be"):
        function(value)
