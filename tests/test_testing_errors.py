"""What `funcsgmcmc.testing` refuses, and how it says so."""

import functools
import math

import pytest
import torch
from tensordict import TensorDict

import funcsgmcmc as fs
import users
from funcsgmcmc.testing import (
    SPECS,
    Quadratic,
    SamplerSpec,
    check_law,
    check_laws,
    check_log_prior,
    check_preconditioner,
    check_refusals,
    check_stationary,
    law,
    laws,
    oracles,
)


def no_momentum(chain, grads, noise, prior_pull, **settings):
    return {"w": grads}


def oracle_gives(**values):
    """Check SGLD against an oracle that gives these fields."""
    return check_law(
        laws.oracle_is_followed, SamplerSpec(fs.sgld, oracle_step=lambda *chain, **settings: values)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_laws(fs.sgld(0.1, nbeta=1.0)), TypeError, "need its factory.* got SGLD"),
        (lambda: check_laws(users.SGLD), TypeError, "need its factory.* got the class SGLD"),
        (lambda: check_laws(torch.add), TypeError, "factory must show its settings, got <built-in"),
        (
            lambda: check_laws(functools.partial(fs.sgld, 0.1)),
            TypeError,
            r"must take lr by name, got one that takes \(\*, noise_level",
        ),
        (
            lambda: check_laws(lambda lr, nbeta: 5),
            TypeError,
            "what <lambda> returns must be a Samp",
        ),
        (
            lambda: check_laws(lambda lr, *, nbeta: fs.sgld(0.1, nbeta=1.0)),
            ValueError,
            r"is given \w+ for each of \d chains and returns a .*per_chain=False",
        ),
        (lambda: check_laws(fs.contour_sgld), ValueError, "got no energy_range"),
        (
            lambda: check_laws(fs.sgld, laws=None),
            TypeError,
            "laws must be laws of func.* got None",
        ),
        (lambda: check_laws(fs.sgld, seed=0.5), TypeError, "seed must be an integer, got 0.5"),
        (
            lambda: check_law(fs.sgld, laws.purity),
            TypeError,
            "a law must be a Law, got function",
        ),
        (
            lambda: check_law(laws.units_of_energy, fs.sgld),
            ValueError,
            "sgld: its units are not given, got None",
        ),
        (
            lambda: check_law(law(nbet=0.0)(lambda problem: None), fs.sgld),
            ValueError,
            "no sampler has a setting 'nbet'",
        ),
        (
            lambda: SamplerSpec(fs.sgld, settings=["lr"]),
            TypeError,
            "settings must be a mapping of n",
        ),
        (
            lambda: SamplerSpec(fs.sgld, ranges={"noise_level": (1,)}),
            TypeError,
            r"ranges\['noise_level'\] must be two numbers, got \(1,\)",
        ),
        (
            lambda: SamplerSpec(fs.sgld, ranges={"noise_level": (0, math.inf)}),
            ValueError,
            r"ranges\['noise_level'\] must be finite, got inf",
        ),
        (
            lambda: SamplerSpec(fs.sgld, ranges={"noise_level": (2, 1)}),
            ValueError,
            "must be lowest and highest, got 2 and 1",
        ),
        (lambda: SamplerSpec(fs.sgld, units={"lr": 1}), TypeError, "units.* two numbers, got 1"),
        (lambda: SamplerSpec(fs.sgld, schedulable="lr"), TypeError, "tuple of names, got 'lr'"),
        (
            lambda: SamplerSpec(fs.sgld, oracle_step=3),
            TypeError,
            "oracle_step must be a function, got 3",
        ),
        (
            lambda: SamplerSpec(fs.sgld, refused=({"lr": "x"},)),
            TypeError,
            "refused must be pairs of settings and a pattern, got {'lr'",
        ),
        (
            lambda: SamplerSpec(fs.sgld, refused=(({"frction": -1.0}, "frction"),)),
            ValueError,
            "sgld has no setting frction",
        ),
        (
            lambda: check_law(
                laws.oracle_is_followed, SamplerSpec(fs.sgld, oracle_step=lambda *a, **s: None)
            ),
            TypeError,
            "what oracle_step returns must be a mapping of names, got None",
        ),
        (
            lambda: oracle_gives(params=[0.0] * 99),
            ValueError,
            r"must give params of shape \(.*\), got \(99,\)",
        ),
        (
            lambda: oracle_gives(params="x"),
            TypeError,
            "the oracle must give params as numbers, got 'x'",
        ),
        (
            lambda: check_preconditioner(fs.preconditioners.rmsprop()),
            TypeError,
            "make must be a function, got RMSprop",
        ),
        (
            lambda: check_preconditioner(lambda params: None),
            TypeError,
            "what make returns must be a Preconditioner, got NoneType",
        ),
        (
            lambda: check_log_prior(
                lambda params: params["w"].sum(), TensorDict({"w": torch.zeros(2)}, [2])
            ),
            ValueError,
            r"params must be those of one chain, got batch size \(2,\)",
        ),
        (
            lambda: check_log_prior(
                lambda params: params["w"].sum(), {"w": torch.zeros(2)}, elements=3
            ),
            TypeError,
            "elements must be a SearchStrategy, got int",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0), {"w": torch.ones(2)}),
            TypeError,
            "target must be a Quadratic, got dict",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0), num_chains=100),
            ValueError,
            "num_chains must be >= 200, got 100",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0), power=0.1),
            ValueError,
            "power must be >= 0.5, got 0.1",
        ),
        (
            lambda: check_stationary(fs.sgld(50.0, nbeta=1.0)),
            AssertionError,
            "SGLD diverged in 10000 of 10000 chains",
        ),
        (
            lambda: Quadratic({"w": torch.ones(2)}, {"w": torch.tensor([0.0, math.nan])}),
            ValueError,
            r"minimum\['w'\] must be finite",
        ),
        (lambda: check_laws(fs.sgld, laws=[]), ValueError, "at least one law, got none"),
        (lambda: check_laws(fs.sgld, laws=["purity"]), TypeError, "a law must be a Law, got str"),
        (
            lambda: SamplerSpec(fs.sgld, ranges={"lrr": (0, 1)}),
            ValueError,
            "sgld has no setting lrr",
        ),
        (
            lambda: check_law(
                laws.oracle_is_followed, SamplerSpec(fs.sgld, oracle_step=no_momentum)
            ),
            ValueError,
            "the oracle must give params, got",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0, temperature=0.0)),
            ValueError,
            "Var w must be positive and finite, got",
        ),
        (
            lambda: check_stationary(
                SPECS["contour_sgld"].make(0.1, nbeta=1.0, **SPECS["contour_sgld"].settings)
            ),
            ValueError,
            "draws must all count alike",
        ),
        (lambda: check_laws(fs.sgld, profile="slow"), ValueError, "profile must be one of 'quick'"),
        (
            lambda: check_refusals(SamplerSpec(fs.sgld, refused=(({"lr": 0.1}, "no"),))),
            AssertionError,
            r"sgld takes \{'lr': 0.1\}; it must say 'no'",
        ),
        (
            lambda: check_refusals(SamplerSpec(fs.sgld, refused=(({"lr": -1.0}, "no"),))),
            AssertionError,
            "sgld refuses .* with 'lr must be >= 0, got -1', not with 'no'",
        ),
        (lambda: check_stationary(fs.sgld), TypeError, "sampler must be one made by a factory"),
        (
            lambda: check_stationary(fs.sgld(torch.tensor([0.1, 0.2]), nbeta=1.0)),
            ValueError,
            "settings must be shared by all chains, got 2",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0, bounding_box_size=1.0)),
            ValueError,
            "what is sampled is known without bounding_box_size",
        ),
        (
            lambda: check_stationary(fs.sgld(fs.schedules.cosine(0.1, num_steps=3), nbeta=1.0)),
            ValueError,
            "lr must not change with the step, got a schedule",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0), false_alarm=0.0),
            ValueError,
            "false_alarm must be between 0 and 1, got 0",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0), variance={"v": torch.ones(2)}),
            ValueError,
            "variance",
        ),
        (lambda: Quadratic({"w": torch.zeros(2)}), ValueError, "minimum|hessian"),
        (
            lambda: Quadratic({"w": torch.zeros(2)}, {"w": torch.zeros(2)}),
            ValueError,
            "hessian must be > 0, got",
        ),
        (
            lambda: oracles.precondition(3, None, None, None),
            TypeError,
            "no oracle for a preconditioner of type int",
        ),
    ],
)
def test_bad_calls_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
