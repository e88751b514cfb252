"""`compat` under torch.compile, after `model.to`, and with what the published package saved."""

import copy
import warnings

import devinterp.optim
import pytest
import torch
from torch import nn

import compat
from compat_problems import QUIET

pytestmark = QUIET

METHODS = {
    "sgld": compat.SGMCMC.sgld,
    "rmsprop_sgld": compat.SGMCMC.rmsprop_sgld,
    "sgnht": compat.SGMCMC.sgnht,
    "SGLD": compat.SGLD,
    "SGNHT": compat.SGNHT,
}


def train(make, compile_what=None, steps=3, **settings) -> list[torch.Tensor]:
    """A few iterations of a training loop: the parameters in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    inputs, targets = torch.randn(16, 4), torch.randn(16, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(model.parameters(), lr=1e-3, nbeta=5.0, **settings)
    step = optimizer.step
    if compile_what == "step":
        step = torch.compile(step, backend="eager")

    def iteration():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        step()

    if compile_what == "iteration":
        iteration = torch.compile(iteration, backend="eager")
    for _ in range(steps):
        iteration()
    reports = []
    if settings.get("save_metrics"):
        (metrics,) = optimizer.iter_group_metrics()
        reports = [metrics.noise, metrics.distance, metrics.dot_grad_noise]
    if settings.get("sketch_dim"):
        reports += [optimizer.get_sketches().noise]
    return [*(p.detach().clone() for p in model.parameters()), *reports]


REPORTS = {"save_metrics": True, "sketch_dim": 5}  # `SGNHT` has neither


@pytest.mark.parametrize("what", [pytest.param("step", marks=pytest.mark.slow), "iteration"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in METHODS), *((name, REPORTS) for name in METHODS if name != "SGNHT")],
)
def test_every_class_compiles_to_the_same_chain(name, settings, what):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(METHODS[name], what, **settings)
    # Graphs may break, where numbers are read for reports, but the update is one.
    reasons = "\n".join(torch._dynamo.utils.counters["graph_break"])
    assert "terms.py" not in reasons
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, other in zip(compiled, train(METHODS[name], **settings), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", METHODS)
def test_state_follows_the_dtype_of_the_model(name):
    """`model.double()` after the first step."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    settings = {} if "sgnht" in name.lower() else {"localization": 2.0, "bounding_box_size": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = METHODS[name](model.parameters(), lr=1e-3, nbeta=5.0, **settings)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        optimizer.zero_grad()
        model(torch.ones(4, 3, dtype=dtype)).square().mean().backward()
        optimizer.step()
        for param in model.parameters():
            assert param.dtype == dtype
            for value in optimizer.state[param].values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    assert value.dtype == dtype


@pytest.mark.parametrize(
    "settings", [{}, {"localization": 5.0}, {"localization": 5.0, "weight_decay": 2.0}], ids=str
)
@pytest.mark.parametrize("name", ["sgld", "rmsprop_sgld"])
def test_a_published_state_dict_is_loaded(name, settings):
    """… and its chain goes on, from the same seed."""

    def make(package):
        params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.linspace(0, 1, 3))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = getattr(package.SGMCMC, name)(params, lr=0.01, nbeta=2.0, **settings)
        return params, optimizer

    def steps(params, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            for param in params:
                param.grad = param.detach().clone()
            optimizer.step()

    theirs, published = make(devinterp.optim)
    steps(theirs, published, 0)
    ours, optimizer = make(compat)
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            one.copy_(other)
    optimizer.load_state_dict(copy.deepcopy(published.state_dict()))
    steps(theirs, published, 1)
    steps(ours, optimizer, 1)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("state_dict", "error", "message"),
    [
        ({}, ValueError, r"state_dict must hold 'state' and 'param_groups', got \[\]"),
        (None, TypeError, "state_dict must be a mapping, got NoneType"),
        ({"state": {}}, ValueError, r"got \['state'\]"),
    ],
)
def test_what_is_no_state_dict_is_refused(state_dict, error, message):
    optimizer = compat.SGMCMC.sgld([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state_dict)


def test_bad_values_are_refused_now_and_later():
    bad = nn.Parameter(torch.tensor([1.0, torch.nan]))
    for make in METHODS.values():
        with pytest.raises(ValueError, match=r"params\[0\] must be finite, got 1 entries"):
            make([bad], nbeta=2.0)
    param = nn.Parameter(torch.ones(2))
    optimizer = compat.SGMCMC.sgld([param], nbeta=2.0)
    param.grad = torch.ones(2)
    for value in (torch.inf, torch.nan, -1.0):
        optimizer.param_groups[0]["lr"] = value
        with pytest.raises(ValueError, match="lr must be "):
            optimizer.step()
    assert torch.equal(param, torch.ones(2))
    with pytest.raises(ValueError, match=r"mask\[0\] must be >= 0, got"):
        compat.SGMCMC.sgld([param], mask=torch.tensor([1.0, -1.0]))
    with pytest.raises(
        ValueError, match=r"one tensor for each parameter, of shapes .* got .*None, None"
    ):
        compat.SGMCMC([param, nn.Parameter(torch.ones(3))], mask=[torch.ones(2), None, None])
