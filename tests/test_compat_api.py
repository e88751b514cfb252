"""The names and signatures of `compat` are those of the documented `devinterp.optim` 2.0.1.

`devinterp_signatures.txt` lists them, one a line, from the API document.
"""

import importlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import devinterp.utils
import pytest
import torch
from torch.utils.data import DataLoader

import compat
import compat.sgmcmc
from compat.metrics import Metrics
from compat.sketch import CountSketch, SketchBuffer
from compat.utils import default_nbeta

SIGNATURES = (Path(__file__).parent / "devinterp_signatures.txt").read_text().splitlines()


def plain(signature: str) -> str:
    """A signature without module names, quotes around the names of types, and `Union`."""
    signature = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", signature)
    signature = re.sub(r"'([A-Z]\w*)'", r"\1", signature)
    literals = re.compile(r"Union\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")  # before Python 3.14
    return literals.sub(
        lambda union: re.sub(r", (?![^\[]*\])", " | ", union[1]).replace("NoneType", "None"),
        signature,
    )


@pytest.mark.parametrize("documented", SIGNATURES, ids=lambda line: line.split("(")[0])
def test_signature_is_the_documented_one(documented):
    name, rest = documented.split("(", 1)
    module, *path = name.split(".")
    value: Any = importlib.import_module(f"compat.{module}")
    for part in path:
        value = getattr(value, part)
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    if len(path) > 1 and inspect.isroutine(value) and parameters[0].name == "self":
        signature = signature.replace(parameters=parameters[1:])
    if len(path) == 1:
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    assert plain(str(signature)) == plain(f"({rest}")


def test_attributes_are_the_documented_ones():
    assert Metrics.NORM_FIELDS == (
        "scaled_grad",
        "unscaled_grad",
        "localization",
        "weight_decay",
        "noise",
        "distance",
    )
    assert Metrics.DOT_FIELDS == ("dot_grad_prior", "dot_grad_noise", "dot_prior_noise")
    assert Metrics.NORM_FIELDS[:5] == SketchBuffer.QUANTITIES
    assert issubclass(compat.SGLD, torch.optim.Optimizer)
    assert compat.SamplingMethodLiteral is compat.sgmcmc.SamplingMethodLiteral


def test_methods_are_found_by_name():
    for name in ("sgld", "rmsprop_sgld", "sgnht"):
        assert compat.SGMCMC.get_method(name) == getattr(compat.SGMCMC, name)
    with pytest.raises(ValueError, match="method must be one of 'sgld', 'rmsprop_sgld', 'sgnht'"):
        compat.SGMCMC.get_method("hmc")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [2, 17, 512])
def test_default_nbeta_is_the_published_one(size, steps):
    loader = DataLoader(torch.utils.data.TensorDataset(torch.ones(600)), batch_size=size)
    for given in (size, loader):
        expected = devinterp.utils.default_nbeta(given, steps)
        assert default_nbeta(given, steps) == pytest.approx(expected, rel=1e-14)


def test_default_nbeta_needs_a_batch():
    with pytest.warns(UserWarning, match="not defined for m = 1"):
        assert default_nbeta(1) == 1.0
    without_size = DataLoader([1, 2], batch_size=None)
    with pytest.raises(TypeError, match="dataloader must be a DataLoader with a batch size"):
        default_nbeta(without_size)


@pytest.mark.parametrize("wrong", ["1000", 1000.0, None])
def test_default_nbeta_refuses_other_types_as_published(wrong):
    with pytest.raises(NotImplementedError):
        devinterp.utils.default_nbeta(wrong)
    with pytest.raises(NotImplementedError, match="dataloader must be a DataLoader or an int, got"):
        default_nbeta(wrong)


def test_metrics_accumulate_as_documented():
    torch.manual_seed(0)
    parts = [{name: torch.randn(4) for name in Metrics.NORM_FIELDS} for _ in range(2)]
    metrics = Metrics()
    for part in parts:
        metrics.add_sum_squared_(**part)
        prior = part["localization"] + part["weight_decay"]
        metrics.add_dot_products_(part["scaled_grad"], prior, part["noise"])
    metrics.sqrt_norms_()
    whole = {name: torch.cat([part[name] for part in parts]) for name in Metrics.NORM_FIELDS}
    for name, value in whole.items():
        assert getattr(metrics, name).item() == pytest.approx(value.norm().item(), rel=1e-6)
    prior = whole["localization"] + whole["weight_decay"]
    assert metrics.dot_grad_prior.item() == pytest.approx(
        (whole["scaled_grad"] @ prior).item(), rel=1e-5
    )
    assert metrics.dot_prior_noise.item() == pytest.approx(
        (whole["noise"] @ prior).item(), rel=1e-5
    )
    norms = whole["localization"].norm() ** 2 + whole["weight_decay"].norm() ** 2
    assert metrics.prior.item() == pytest.approx(norms.sqrt().item(), rel=1e-6)
    twice = Metrics.aggregate([metrics, metrics])
    assert twice.noise.item() == pytest.approx(metrics.noise.item() * 2**0.5, rel=1e-6)
    assert twice.dot_grad_noise.item() == pytest.approx(2 * metrics.dot_grad_noise.item(), rel=1e-6)
    metrics.zero_()
    assert all(getattr(metrics, name).item() == 0 for name in vars(metrics) if name != "numel")


@pytest.mark.parametrize("seed", [0, 7])
def test_sketches_have_the_published_hashes(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from devinterp.optim.sketch import CountSketch as Published
    published, ours = Published.create(40, 6, seed), CountSketch.create(40, 6, seed)
    assert torch.equal(published.hash_indices, ours.hash_indices)
    assert torch.equal(published.hash_signs, ours.hash_signs)
    assert (ours.input_dim, ours.output_dim, ours.device) == (40, 6, torch.device("cpu"))
    vector = torch.randn(40, dtype=torch.float32)
    torch.testing.assert_close(ours.sketch(vector), published.sketch(vector))
    results = [torch.zeros(6, dtype=torch.float32) for _ in range(2)]
    for sketch, result in zip((published, ours), results, strict=True):
        sketch.scatter_into_(result, vector[:12].view(3, 4), 5)
    torch.testing.assert_close(*results)
    assert ours.to("cpu") is ours


def test_sketch_buffers():
    buffer = SketchBuffer.create(3)
    buffer.noise += 1
    assert buffer.to("cpu") is buffer
    assert buffer.device == torch.device("cpu")
    moved = buffer.to("meta")
    assert moved.device == torch.device("meta")
    moved.noise = buffer.noise
    with pytest.raises(RuntimeError, match="all buffers must be on one device"):
        _ = moved.device
    buffer.zero_()
    assert not buffer.noise.any()
    sketch = CountSketch.create(4, 3)
    with pytest.raises(RuntimeError, match="hash_indices and hash_signs must be on one device"):
        _ = CountSketch(sketch.hash_indices, sketch.hash_signs.to("meta"), 3).device
    assert sketch.to("meta").device == torch.device("meta")
