"""Every sampler and preconditioner against the laws of `funcsgmcmc.testing`."""

import pytest
import torch
from tensordict import TensorDict

from funcsgmcmc import tree
from funcsgmcmc.preconditioners import adam, compose, diagonal, identity, rmsprop
from funcsgmcmc.testing import (
    LAWS,
    SPECS,
    check_law,
    check_log_prior,
    check_preconditioner,
    check_refusals,
    laws,
    strategies,
)

OBEYED = [
    pytest.param(spec, law, id=f"{spec}-{law}")
    for spec in SPECS.values()
    for law in LAWS
    if law.exemption(spec) is None
]


@pytest.mark.parametrize(("spec", "law"), OBEYED)
def test_sampler_obeys(spec, law):
    check_law(law, spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_bad_settings_are_refused(spec):
    check_refusals(spec)


def test_few_are_exempt():
    exempt = {
        (spec.name, law.name) for spec in SPECS.values() for law in LAWS if law.exemption(spec)
    }
    assert exempt == {
        ("rmsprop_sgld", "rotation"),
        ("rmsprop_sgld", "scale_of_the_loss"),
        ("rmsprop_sgld", "pulls_are_the_priors_gradient"),
        ("sglrw", "rotation"),
        ("sglrw", "linearity_in_noise"),
        ("sgnht", "units_of_length"),
    }, "a new exemption is listed here, if the sampler's equation is the reason"


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_sampler_is_its_reference_thoroughly(spec):
    check_law(laws.oracle_is_followed, spec, profile="thorough")


def some_gain(params: TensorDict) -> TensorDict:
    return tree.map_leaves(lambda leaf: leaf.double().sigmoid() + 0.1, params)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: identity(),
        lambda params: diagonal(some_gain(params)),
        lambda params: rmsprop(0.7, 0.2),
        lambda params: rmsprop(0.7, 0.2, curvature="exact"),
        lambda params: rmsprop(0.7, 0.2, curvature="hutchinson"),
        lambda params: adam(0.6, 0.8, 0.2),
        lambda params: compose(rmsprop(0.7, 0.2, curvature="exact"), identity()),
        lambda params: compose(
            diagonal(some_gain(params)),
            adam(0.6, 0.8, 0.2),
            rmsprop(0.7, 0.2),
        ),
        lambda params: compose(
            rmsprop(0.3, 0.2, curvature="exact"),
            rmsprop(0.7, 0.3, curvature="exact"),
        ),
    ],
    ids=["identity", "diagonal", "rmsprop", "exact", "hutchinson", "adam", "I", "DAR", "RR"],
)
def test_preconditioner_obeys(make):
    check_preconditioner(make, profile="quick")


@pytest.mark.parametrize("density", strategies.DENSITIES)
def test_log_prior_obeys(density):
    check_log_prior(strategies.FactorizedLogPrior(density, 1.5), {"w": torch.zeros(2)})
