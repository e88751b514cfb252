"""What samplers do beyond the laws: walls, thermostats, weights, refusals."""

import inspect
import math
import pkgutil
import re
from importlib import import_module

import pytest
import torch
from scipy.integrate import quad
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc import tree
from funcsgmcmc.estimates.plots import plot_llc
from funcsgmcmc.samplers.badoda import ornstein_uhlenbeck
from funcsgmcmc.samplers.settings import SharedSettings
from funcsgmcmc.testing import SPECS
from problems import run

MOMENTUM = [spec for spec in SPECS.values() if spec.has_momentum]


@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_a_chain_that_is_masked_all_over_stays_and_is_healthy(spec):
    params = TensorDict({"w": torch.ones(3)})
    mask = {"w": torch.zeros(3)}
    sampler = spec.make(1.0, nbeta=1.0, mask=mask, **spec.settings)
    state, noise = sampler.init(params, params), params * 0.3
    evaluation = fs.samplers.Evaluation(params, loss=torch.tensor(1.0))
    for _ in range(300):
        state, _ = sampler.update(state, evaluation, noise)
    assert torch.equal(state.params["w"], params["w"])
    assert tree.all_finite(state, state.shape)


@pytest.mark.parametrize("spec", MOMENTUM, ids=str)
def test_walls_turn_the_momentum_round(spec):
    params = TensorDict({"w": torch.tensor([0.0, 0.0])})
    settings = dict(spec.settings)
    sampler = spec.make(0.1, nbeta=1.0, temperature=0.0, bounding_box_size=0.2, **settings)
    push = TensorDict({"w": torch.tensor([-100.0, 1.0])})
    state = sampler.init(params, push * 0)
    state, _ = sampler.update(state, fs.samplers.Evaluation(push), push * 0)
    assert state.params["w"][0] == 0.2
    assert state.momentum["w"][0] < 0  # it was going up
    assert state.momentum["w"][1] < 0  # inside, as the force says


@pytest.mark.parametrize("friction", [-2.0, -1e-9, 0.0, 1e-9, 0.7])
def test_damping_of_badoda_is_that_of_its_equation(friction):
    """Dp = −ξ p dt + √(2A) dB keeps e^(−ξh), and adds 2A ∫ e^(−2ξt) dt to the variance."""
    lr, diffusion_factor = torch.tensor(0.4), torch.tensor(1.3)
    kept, renewed = ornstein_uhlenbeck(torch.tensor(friction), diffusion_factor, lr)
    variance = quad(lambda t: 2 * 1.3 * math.exp(-2 * friction * t), 0, 0.4)[0]
    torch.testing.assert_close(kept, torch.tensor(math.exp(-friction * 0.4)))
    torch.testing.assert_close(renewed, torch.tensor(variance))


@pytest.mark.parametrize("make", [fs.sgnht, fs.badoda])
def test_each_chain_has_its_thermostat(make):
    samples = run(make(1e-3, nbeta=3.0, diffusion_factor=0.1), num_chains=20)
    assert len(samples.state.thermostat.unique()) == 20


@pytest.mark.parametrize("spec", MOMENTUM, ids=str)
def test_momenta_need_noise(spec):
    with pytest.raises(ValueError, match=f"{spec.name} needs noise for its momenta"):
        spec.make(0.1, nbeta=1.0, **spec.settings).init({"w": torch.ones(2)})


def test_contour_sgld_meets_the_same_parts_however_it_is_run():
    """Energies of a large scale, in float32: a part is a small difference of them."""
    sampler = fs.contour_sgld(
        1e-9, nbeta=1e6, energy_range=(1e6 - 1, 1e6 + 9), num_partitions=12, weight_lr=0.1
    )
    theta = []
    for method in ("vmap", "loop"):
        samples = fs.sample(
            lambda params, batch: params["w"].square().sum() + 0 * batch.mean(),
            TensorDict({"w": torch.tensor([1.0], dtype=torch.float32)}),
            torch.zeros(1, dtype=torch.float32),
            sampler,
            num_chains=2,
            num_draws=5,
            key=fs.key(0),
            chain_method=method,
        )
        theta.append(samples.state.theta)
    torch.testing.assert_close(*theta)


def test_weights_of_a_frozen_chain_are_refused():
    def loss_fn(params, batch):
        bad = torch.where(params["w"][0] > 1.5, torch.nan, 1.0)
        return bad * params["w"].square().sum() / 2 + 0 * batch.mean()

    samples = fs.sample(
        loss_fn,
        {"w": torch.zeros(2)},
        torch.zeros(1),
        fs.contour_sgld(0.3, nbeta=1.0, energy_range=(0.1, 3.0), num_partitions=8),
        num_chains=6,
        num_draws=60,
        key=fs.key(1),
        observables={"x": lambda params: params["w"][0]},
    )
    healthy, x = samples.healthy, samples.observables["x"]
    assert not healthy.all()
    assert samples.log_weights[healthy].isfinite().all()
    for row in (~healthy).nonzero().flatten():
        stopped = samples.draw_steps >= samples.frozen_at[row]
        assert torch.equal(samples.log_weights[row].isnan(), stopped)
    with pytest.raises(ValueError, match=r"must be those of healthy chains .* got NaN"):
        fs.weighted_mean(x, samples.log_weights)
    assert abs(fs.weighted_mean(x[healthy], samples.log_weights[healthy]).mean) < 1
    with pytest.raises(ValueError, match="log_weights must have shape"):
        fs.weighted_mean(x[healthy], samples.log_weights)
    with pytest.raises(TypeError, match=r"log_weights must be a tensor .* got NoneType"):
        fs.weighted_mean(x, None)
    for refused in (fs.llc, fs.summary, plot_llc):
        with pytest.raises(ValueError, match=r"the draws have weights .* use weighted_mean"):
            refused(samples)


@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_settings_of_a_wrong_type_are_refused(spec):
    for settings, message in (
        ({"lr": "0.1"}, "lr must be a number or a tensor, got str"),
        ({"lr": lambda step: 0.1}, "lr must be a number or a tensor, got function"),
        ({"nbeta": 1j}, "nbeta must be a number or a tensor, got complex"),
        ({"mask": 1.0}, "mask must be a TensorDict or a mapping, got float"),
    ):
        with pytest.raises(TypeError, match=message):
            spec.make(**({"lr": 0.1, "nbeta": 1.0} | dict(spec.settings) | settings))


def test_the_registry_is_complete():
    """Every factory of a file in `samplers/` stands at the door and has its spec."""
    factories = {
        name
        for file in pkgutil.iter_modules(fs.samplers.__path__)
        for name, value in vars(import_module(f"funcsgmcmc.samplers.{file.name}")).items()
        if inspect.isfunction(value) and "lr" in inspect.signature(value).parameters
        if isinstance(inspect.signature(value).return_annotation, type)
        if issubclass(inspect.signature(value).return_annotation, fs.samplers.Sampler)
    }
    assert factories == SPECS.keys(), "each factory needs its entry in testing/specs.py"
    assert factories <= set(fs.__all__), "each factory needs its name in funcsgmcmc/__init__.py"


@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_help_lists_every_setting_with_its_meaning(spec):
    """Signature, docstring and the settings that all share agree, and no call takes another."""
    parameters = inspect.signature(spec.make).parameters
    assert set(SharedSettings.__annotations__) < set(parameters)
    assert all(each.kind is not each.VAR_KEYWORD for each in parameters.values())
    arguments = inspect.getdoc(spec.make).partition("Args:\n")[2].partition("\n\n")[0]
    documented = re.findall(r"^    (\w+): \S", arguments, re.MULTILINE)
    assert sorted(documented) == sorted(parameters)
    with pytest.raises(TypeError, match=rf"{spec.name}\(\) got an unexpected .* 'lokalization'"):
        spec.make(0.1, nbeta=1.0, **dict(spec.settings), lokalization=1.0)
    with pytest.raises(TypeError, match=rf"{spec.name}\(\) missing 1 required .* 'nbeta'"):
        spec.make(0.1, **dict(spec.settings))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: fs.sgnht(1e-3, nbeta=1.0), "got sampler = SGLD beside SGNHT"),
        (
            lambda: fs.sgld(1e-3, nbeta=1.0, bounding_box_size=1.0),
            "got bounding_box_size = None beside a number",
        ),
        (
            lambda: fs.sgld(fs.schedules.cosine(1e-3, 1e-4, num_steps=5), nbeta=1.0),
            "got lr = a number beside Cosine",
        ),
        (lambda: fs.rmsprop_sgld(1e-3, nbeta=1.0), "got preconditioner = Identity beside RMSprop"),
        (
            lambda: fs.sgld(1e-3, nbeta=1.0, mask={"w": True}),
            "got mask = None beside nothing",
        ),
    ],
)
def test_samplers_of_unlike_settings_do_not_stack(other, message):
    with pytest.raises(TypeError, match=f"to stack must have the same settings, {message}"):
        torch.stack([fs.sgld(1e-3, nbeta=1.0), other()])
