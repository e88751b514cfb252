"""What a user of `torch.optim` expects of an optimizer holds for those of `compat`."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import devinterp.optim
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import compat
from compat import SGLD, SGMCMC, SGNHT
from compat.preconditioner import NHTPreconditioning, Preconditioner, PreconditionerCoefs
from compat.prior import CompositePrior, GaussianPrior
from compat.sketch import CountSketch

pytestmark = [
    pytest.mark.filterwarnings("ignore:(SGLD|SGNHT) is deprecated"),
    pytest.mark.filterwarnings("ignore:noise_level is"),
]

Make = Callable[[Any], Any]


def everything(method: str, **settings: Any) -> Make:
    shared = {"nbeta": 5.0, "save_metrics": True, "sketch_dim": 4, "bounding_box_size": 0.5}
    return lambda params: SGMCMC.get_method(method)(params, lr=1e-3, **shared, **settings)


def five() -> float:
    return 5.0


class Elsewhere(GaussianPrior):
    """Centres in float64, whatever the parameters are."""

    def initialize(self, params):
        return {param: {self.key: param.detach().double() + 1 / 3} for param in params}


class Averaging(Preconditioner):
    """A running average in float64, whatever the parameters are."""

    def get_coefficients(self, param, grad, state):
        average = state.get("average", torch.zeros_like(grad, dtype=torch.float64))
        state["average"] = 0.9 * average + grad
        return PreconditionerCoefs(1.0, 1.0, 1.0, 1 / (1 + state["average"].abs()))


OPTIMIZERS: dict[str, Make] = {
    "SGLD": lambda params: SGLD(
        params, lr=1e-3, nbeta=5.0, localization=1.0, save_metrics=True, sketch_dim=4
    ),
    "SGNHT": lambda params: SGNHT(params, lr=1e-3, nbeta=5.0, bounding_box_size=0.5),
    "sgld": everything("sgld", weight_decay=0.3, localization=2.0),
    "rmsprop_sgld": everything("rmsprop_sgld", localization=2.0, alpha=0.9),
    "sgnht": everything("sgnht"),
    "centres of another dtype": lambda params: SGMCMC(
        params,
        lr=1e-3,
        nbeta=5.0,
        prior=CompositePrior([GaussianPrior(1.0), Elsewhere(50.0)]),
        preconditioner=Averaging(),
        save_metrics=True,
        sketch_dim=4,
    ),
    "composites": lambda params: SGMCMC(
        params,
        lr=1e-3,
        nbeta=five,
        prior=CompositePrior([CompositePrior([GaussianPrior(1.0)]), GaussianPrior(2.0, 0.5)]),
        preconditioner="rmsprop",
        save_metrics=True,
    ),
}

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Training:
    """A small network in a training loop."""

    def __init__(self, make: Make, dtype: torch.dtype = torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        self.inputs = torch.randn(16, 4, dtype=dtype)
        self.targets = torch.randint(3, (16,))
        layers = [self.model[0], self.model[2]]
        self.optimizer = make([{"params": list(layer.parameters())} for layer in layers])

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.model(self.inputs), self.targets)

    def steps(self, number: int, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(number):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()

    def report(self) -> list[torch.Tensor]:
        """Parameters, and what the optimizer says of its last step."""
        report = [param.detach() for param in self.model.parameters()]
        if self.optimizer.save_metrics:
            metrics = vars(self.optimizer.get_metrics())
            report += [torch.as_tensor(value) for value in metrics.values()]
        if self.optimizer.save_sketches:
            report += vars(self.optimizer.get_sketches()).values()
        return report


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


def saved_bytes(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_run_is_resumed_bit_for_bit(make, dtype):
    training = Training(make, dtype)
    training.steps(3, seed=1)
    checkpoint = saved_bytes((training.model.state_dict(), training.optimizer.state_dict()))
    saved = [value.clone() for value in training.report()]
    training.steps(3, seed=2)

    model_state, optimizer_state = torch.load(checkpoint, weights_only=True)
    resumed = Training(make, dtype)
    for param in resumed.model.parameters():
        param.data += 1.0  # made elsewhere, as after training
    resumed.model.load_state_dict(model_state)
    resumed.optimizer.load_state_dict(optimizer_state)
    assert_equal(resumed.report(), saved)
    resumed.steps(3, seed=2)
    assert_equal(resumed.report(), training.report())


@every_optimizer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_a_copy_goes_on_alike(make, duplicate):
    training = Training(make)
    training.steps(2, seed=1)
    copied = copy.copy(training)
    copied.model, copied.optimizer = duplicate((training.model, training.optimizer))
    assert_equal(copied.report(), training.report())
    training.steps(2, seed=2)
    copied.steps(2, seed=2)
    assert_equal(copied.report(), training.report())
    saved = torch.load(saved_bytes(copied.optimizer.state_dict()), weights_only=True)
    assert "preconditioner" not in saved["param_groups"][0]


def test_what_a_state_dict_holds():
    def make(**group):
        return SGLD([{"params": [nn.Parameter(torch.tensor([1.0, 2.0]))], **group}], nbeta=five)

    optimizer = make(mask=torch.tensor([1.0, 0.0]), tag={"layer": [3, "head"]}, fresh=object())
    optimizer.param_groups[0] |= {"lr": np.float32(0.5), "noise_level": np.int64(2)}
    state = torch.load(saved_bytes(optimizer.state_dict()), weights_only=True)
    other = make()
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert (group["lr"], group["noise_level"], group["tag"]) == (0.5, 2, {"layer": [3, "head"]})
    assert group["mask"].tolist() == [1.0, 0.0]
    assert group["nbeta"] is five
    assert "fresh" not in state["param_groups"][0]


def test_objects_stay_those_of_the_optimizer_that_loads():
    def make(nbeta, mask):
        params = [nn.Parameter(torch.ones(2))]
        return SGMCMC.rmsprop_sgld(params, nbeta=nbeta, mask=mask)

    saving, loading = make(3.0, torch.ones(2)), make(five, torch.tensor([0.0, 1.0]))
    for optimizer in (saving, loading):
        param = next(optimizer.get_params())
        param.grad = torch.ones(2)
        optimizer.step()
    mask, preconditioner = (loading.param_groups[0][name] for name in ("mask", "preconditioner"))
    loading.load_state_dict(saving.state_dict())
    assert loading.param_groups[0]["nbeta"] is five
    assert loading.param_groups[0]["mask"] is mask
    assert loading.param_groups[0]["preconditioner"] is preconditioner


@pytest.mark.parametrize(
    ("save", "load", "missing"),
    [
        ({}, {"save_metrics": True}, "initial_param"),
        ({}, {"bounding_box_size": 1.0}, "initial_param"),
        ({"preconditioner": "identity"}, {"preconditioner": NHTPreconditioning()}, "momentum"),
        ({}, {"prior": 1.0}, "prior_center"),
    ],
)
def test_a_state_dict_that_lacks_something_is_refused(save, load, missing):
    saving, loading = (
        SGMCMC([nn.Parameter(torch.ones(2))], **settings) for settings in (save, load)
    )
    message = f"the state dict must hold '{missing}' of parameter 0, as this optimizer does"
    with pytest.raises(ValueError, match=message):
        loading.load_state_dict(saving.state_dict())


@every_optimizer
def test_a_run_may_go_back_to_its_start(make):
    training = Training(make)
    start = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    runs = []
    for _ in range(2):
        training.steps(3, seed=1)
        runs.append([value.clone() for value in training.report()])
        training.model.load_state_dict(start[0])
        training.optimizer.load_state_dict(start[1])
    assert_equal(*runs)


def test_sketches_of_another_size_are_refused():
    saving, loading = (
        SGMCMC.sgld([nn.Parameter(torch.ones(2))], nbeta=2.0, sketch_dim=dim) for dim in (3, 5)
    )
    with pytest.raises(ValueError, match="the state dict's sketches must have 5 entries, got 3"):
        loading.load_state_dict(saving.state_dict())


def test_sketches_take_in_a_group_that_is_added_during_a_run():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    optimizer = SGMCMC.sgld([params[0]], nbeta=2.0, noise_level=0.0, sketch_dim=5)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.add_param_group({"params": [params[1]]})
    optimizer.step()
    expected = CountSketch.create(7, 5).sketch(torch.full((7,), 0.01))
    torch.testing.assert_close(optimizer.get_sketches().scaled_grad, expected)


@every_optimizer
def test_hooks_are_called(make):
    training, calls = Training(make), []
    optimizer = training.optimizer
    optimizer.register_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    optimizer.register_state_dict_post_hook(
        lambda _, state: {**state, "note": type(state["param_groups"][0].get("metrics"))}
    )
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after load"))
    training.steps(1, seed=0)
    state = optimizer.state_dict()
    assert state["note"] in (dict, type(None))
    optimizer.load_state_dict(state)
    assert calls == ["before step", "after step", "before save", "before load", "after load"]


@every_optimizer
def test_a_scheduler_drives_lr(make):
    training = Training(make)
    scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda epoch: 0.5**epoch)
    for epoch in range(3):
        assert [group["lr"] for group in training.optimizer.param_groups] == [1e-3 * 0.5**epoch] * 2
        training.steps(1, seed=epoch)
        scheduler.step()


def test_lr_is_read_at_every_step():
    runs = []
    for lr in (1e-3, torch.tensor(1e-3)):
        training = Training(lambda params: SGMCMC.sgld(params, lr=0.5, nbeta=2.0))
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        training.steps(2, seed=0)
        runs.append(training.report())
    direct = Training(lambda params: SGMCMC.sgld(params, lr=1e-3, nbeta=2.0))
    direct.steps(2, seed=0)
    assert_equal(runs[0], direct.report())
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@every_optimizer
def test_a_grad_scaler_unscales_and_skips(make):
    training, plain = Training(make, torch.float32), Training(make, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain.steps(2, seed=0)
    torch.manual_seed(0)
    for _ in range(2):
        training.optimizer.zero_grad()
        scaler.scale(training.loss()).backward()
        scaler.step(training.optimizer)
        scaler.update()
    for a, b in zip(training.report(), plain.report(), strict=True):
        torch.testing.assert_close(a, b)
    before = training.report()
    training.optimizer.zero_grad()
    scaler.scale(training.loss() * float("inf")).backward()
    scaler.step(training.optimizer)
    assert_equal(training.report(), before)


def test_sparse_gradients_are_taken():
    embedding = nn.Embedding(6, 2, sparse=True)
    optimizer = SGMCMC.sgld(embedding.parameters(), lr=0.1, nbeta=2.0, save_metrics=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    optimizer.step()
    assert optimizer.get_metrics().unscaled_grad.item() == pytest.approx(0.1 * 10**0.5)


def test_named_parameters_are_taken():
    model = nn.Linear(2, 3)
    optimizer = SGMCMC.sgld(model.named_parameters(), nbeta=2.0)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert list(optimizer.get_params()) == list(model.parameters())
    assert optimizer.device == torch.device("cpu")


@pytest.mark.parametrize(
    "params", [nn.Parameter(torch.ones(2)), {"params": [nn.Parameter(torch.ones(2))]}]
)
def test_one_parameter_or_one_group_may_be_given_bare(params):
    optimizer = SGMCMC.sgld(params, nbeta=2.0)
    assert [param.shape for param in optimizer.get_params()] == [(2,)]


@pytest.mark.parametrize("name", ["SGLD", "SGNHT"])
def test_the_older_classes_refuse_a_bare_tensor_as_torch_does(name):
    """As published; `SGMCMC` takes one, as published."""
    bare = nn.Parameter(torch.ones(2))
    for package in (compat, devinterp.optim):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
                getattr(package, name)(bare, lr=0.1)


def test_metrics_and_sketches_are_asked_for():
    optimizer = SGMCMC.sgld([nn.Parameter(torch.ones(2))], nbeta=2.0)
    with pytest.raises(RuntimeError, match="metrics are not enabled"):
        optimizer.get_metrics()
    with pytest.raises(RuntimeError, match="sketches are not enabled"):
        optimizer.get_sketches()


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda p: SGLD(p, nbeta=2.0), ["SGLD is deprecated: SGMCMC.sgld"]),
        (lambda p: SGNHT(p, nbeta=2.0), ["SGNHT is deprecated: SGMCMC.sgnht"]),
        (lambda p: SGLD(p, noise_level=2), ["deprecated", "noise_level is 2", "nbeta is 1"]),
        (SGMCMC.sgld, ["nbeta is 1"]),
        (SGMCMC.sgnht, ["nbeta is 1"]),
        (lambda p: SGMCMC.rmsprop_sgld(p, noise_level=0.5), ["noise_level is 0.5", "nbeta is 1"]),
        (lambda p: SGNHT(p, nbeta=2.0, metrics=["noise"]), ["deprecated", "NoiseNorm"]),
        (lambda p: SGNHT(p, nbeta=2.0, metrics=["dws"]), ["deprecated", "MALA"]),
        (lambda p: SGNHT(p, nbeta=2.0, save_mala_vars=True), ["deprecated", "MALA"]),
        (SGMCMC, []),
    ],
)
@pytest.mark.filterwarnings("always")
def test_warnings_are_those_documented(make, messages, recwarn):
    make([nn.Parameter(torch.ones(2))])
    assert len(recwarn) == len(messages)
    for warning, message in zip(recwarn, messages, strict=True):
        assert message in str(warning.message)
        category = DeprecationWarning if "deprecated" in message else UserWarning
        assert warning.category is category
        assert warning.filename == __file__


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of tensors that a call holds at once, beyond those that were there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        # The largest parameter's noise, displacement and pull; metrics hold all directions at once.
        (lambda params: SGMCMC.sgld(params, nbeta=2.0), 1),
        (lambda params: SGMCMC.sgld(params, nbeta=2.0, localization=1.0), 2),
        (lambda params: SGLD(params, nbeta=2.0, localization=1.0), 2),
        (lambda params: SGMCMC.sgnht(params, nbeta=2.0), 5),
        (lambda params: SGMCMC.rmsprop_sgld(params, nbeta=2.0, localization=1.0), 7),
        (lambda params: SGMCMC.sgld(params, nbeta=2.0, localization=1.0, save_metrics=True), 7),
    ],
)
def test_a_step_holds_temporaries_of_one_parameter(make, copies):
    size, number = 250_000, 20
    params = [nn.Parameter(torch.zeros(size, dtype=torch.float32)) for _ in range(number)]
    torch.set_default_dtype(torch.float32)
    optimizer = make(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    peak = peak_memory(optimizer.step)
    assert 4 * size <= peak <= 4 * size * copies * 1.02
