"""What a user of `torch.optim` expects of an optimizer holds for those of `compat`."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from compat import SGLD, SGMCMC, SGNHT
from compat.prior import CompositePrior, GaussianPrior

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


OPTIMIZERS: dict[str, Make] = {
    "SGLD": lambda params: SGLD(
        params, lr=1e-3, nbeta=5.0, localization=1.0, save_metrics=True, sketch_dim=4
    ),
    "SGNHT": lambda params: SGNHT(params, lr=1e-3, nbeta=5.0, bounding_box_size=0.5),
    "sgld": everything("sgld", weight_decay=0.3, localization=2.0),
    "rmsprop_sgld": everything("rmsprop_sgld", localization=2.0, alpha=0.9),
    "sgnht": everything("sgnht"),
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
        if getattr(self.optimizer, "save_metrics", False):
            metrics = self.optimizer.get_metrics()
            report += [metrics.noise, metrics.distance, metrics.dot_grad_noise]
        if self.optimizer.save_sketches:
            report.append(self.optimizer.get_sketches().localization)
        return report


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_run_is_resumed_bit_for_bit(make, dtype):
    training = Training(make, dtype)
    training.steps(3, seed=1)
    buffer = io.BytesIO()
    torch.save((training.model.state_dict(), training.optimizer.state_dict()), buffer)
    saved = [value.clone() for value in training.report()]
    training.steps(3, seed=2)

    buffer.seek(0)
    model_state, optimizer_state = torch.load(buffer, weights_only=True)
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
    copied.optimizer.state_dict()


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
