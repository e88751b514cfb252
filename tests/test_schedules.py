"""Schedules: their values, in samplers, in runs, in compiled steps."""

import math

import pytest
import torch

import funcsgmcmc as fs
from funcsgmcmc.testing import SPECS
from problems import assert_same, run

STEPS = torch.arange(40)


def test_values():
    t = STEPS.double()
    assert torch.equal(fs.schedules.constant(0.3)(STEPS), torch.full((40,), 0.3))
    torch.testing.assert_close(
        fs.schedules.polynomial_decay(2.0, offset=3.0, power=0.6)(STEPS), 2.0 * (3.0 + t).pow(-0.6)
    )
    cosine = fs.schedules.cosine(1.0, 0.2, num_steps=10)(STEPS)
    assert cosine[0] == 1.0
    torch.testing.assert_close(cosine[5], torch.tensor(0.6))
    assert (cosine[10:] - 0.2).abs().max() < 1e-15
    assert (cosine[1:] <= cosine[:-1]).all()
    cycles = fs.schedules.cyclical(0.5, num_steps_per_cycle=8)(STEPS)
    for step in range(40):
        expected = 0.25 * (math.cos(math.pi * (step % 8) / 8) + 1)
        assert abs(float(cycles[step]) - expected) < 1e-15
    phases = fs.schedules.sampling_phases(0.7, num_steps_per_cycle=8, exploration=0.25)(STEPS)
    assert torch.equal(phases, torch.where(STEPS % 8 < 2, 0.0, 0.7))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.schedules.constant(-1.0), "value must be >= 0, got -1"),
        (lambda: fs.schedules.polynomial_decay(1.0, offset=0.0), "offset must be > 0, got 0"),
        (lambda: fs.schedules.polynomial_decay(1.0, power=math.nan), "power must be >= 0, got nan"),
        (lambda: fs.schedules.cosine(1.0, num_steps=0), "num_steps must be > 0, got 0"),
        (
            lambda: fs.schedules.cyclical(1.0, num_steps_per_cycle=0.5),
            "num_steps_per_cycle must be >= 1",
        ),
        (
            lambda: fs.schedules.sampling_phases(num_steps_per_cycle=5, exploration=1.0),
            "exploration must be < 1, got 1",
        ),
        (
            lambda: fs.schedules.cosine(torch.ones(2), torch.ones(3), num_steps=4),
            "got 2 for start and 3 for end",
        ),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "name"),
    [(spec, name) for spec in SPECS.values() for name in spec.schedulable],
    ids=str,
)
def test_a_constant_schedule_is_the_number(spec, name, params):
    settings = {"lr": 1e-3, "nbeta": 3.0, "temperature": 0.8} | dict(spec.settings)
    scheduled = spec.make(**(settings | {name: fs.schedules.constant(settings[name])}))
    assert_same(run(spec.make(**settings)), run(scheduled), exact=True)


def test_a_schedule_per_chain_is_each_chains_own():
    peaks = torch.tensor([1e-3, 2e-3, 5e-3])
    swept = run(fs.sgld(fs.schedules.cosine(peaks, num_steps=4), nbeta=3.0), num_chains=3)
    assert swept.is_sweep
    for chain, peak in enumerate(peaks.tolist()):
        sampler = fs.sgld(fs.schedules.cosine(peak, num_steps=4), nbeta=3.0)
        alone = run(sampler, num_chains=1, chain_offset=chain)
        torch.testing.assert_close(alone.losses[0], swept.losses[chain])
    stacked = torch.stack(
        [fs.sgld(fs.schedules.cosine(p, num_steps=4), nbeta=3.0) for p in peaks.tolist()]
    )
    assert_same(swept, run(stacked, num_chains=3))


def test_a_compiled_run_follows_its_schedule_without_compiling_again():
    def go(peak, compile):
        sampler = fs.sgld(
            fs.schedules.cyclical(peak, num_steps_per_cycle=3),
            nbeta=fs.schedules.polynomial_decay(3.0),
            temperature=fs.schedules.cosine(1.0, 0.5, num_steps=5),
        )
        return run(sampler, compile=compile)

    first = go(1e-2, True)
    assert_same(first, go(1e-2, False))
    with torch.compiler.set_stance("fail_on_recompile"):
        go(2e-2, True)


def test_draws_are_made_where_the_temperature_is_not_zero():
    sampler = fs.cyclical_sgld(1e-3, nbeta=3.0, num_steps_per_cycle=5, exploration=0.4)
    samples = run(sampler, num_draws=4, num_burnin_steps=1, num_steps_between_draws=2)
    # Steps 2 3 4, 7 8 9, 12 13 14 sample: w is a draw where the step after them begins, every
    # second one from step 1 on.
    assert samples.draw_steps.tolist() == [4, 8, 10, 14]
    assert samples.num_steps == 15
    assert samples.draws["0.bias"].shape[:2] == (5, 4)
    torch.testing.assert_close(samples.draw_losses, samples.losses[:, [4, 8, 10, 14]])
    # While it explores, it descends: no noise.
    noise = samples.metrics.noise
    assert torch.equal((noise > 0)[0], torch.arange(15) % 5 >= 2)


def test_draws_are_not_of_the_exploration():
    """Chains that explore from one place stay together; their draws are apart, the first too."""
    samples = fs.sample(
        lambda params, batch: (params["w"] ** 2).sum() / 2 + 0 * batch.mean(),
        {"w": torch.full((1,), 3.0)},
        torch.zeros(1),
        fs.cyclical_sgld(0.5, nbeta=1.0, num_steps_per_cycle=20, exploration=0.5),
        num_chains=50,
        num_draws=21,
        key=fs.key(0),
        record=["draws"],
    )
    assert samples.draw_steps.tolist() == [*range(11, 21), *range(31, 41), 51]
    assert all(len(draw.unique()) == 50 for draw in samples.draws["w"][..., 0].T)


def test_a_temperature_that_never_samples_is_refused():
    cold = fs.sgld(1e-3, nbeta=3.0, temperature=fs.schedules.constant(0.0))
    with pytest.raises(ValueError, match=r"must be > 0 at some steps.* got 0 at steps 0 to"):
        run(cold)
    ends = fs.sgld(1e-3, nbeta=3.0, temperature=fs.schedules.cosine(1.0, num_steps=3))
    with pytest.raises(ValueError, match="must be > 0 at some steps"):
        run(ends, num_draws=10)
    length = torch.tensor([4, 5])
    uneven = fs.cyclical_sgld(1e-3, nbeta=3.0, num_steps_per_cycle=length)
    with pytest.raises(ValueError, match="chains must sample and explore at the same steps"):
        run(uneven, num_chains=2)


def test_llc_uses_the_nbeta_of_each_draw():
    nbeta = fs.schedules.polynomial_decay(3.0, offset=2.0, power=1.0)
    samples = run(fs.sgld(1e-3, nbeta=nbeta), num_burnin_steps=2)
    expected = 3.0 / (2.0 + samples.draw_steps - 1)  # that of the step that led there
    excess = samples.draw_losses - samples.initial_loss
    torch.testing.assert_close(fs.llc_draws(samples), expected * excess)


def test_llc_counts_the_temperature_and_refuses_zero():
    settings = {"num_draws": 4, "init_noise": 0.0}
    hot = run(fs.sgld(1e-3, nbeta=3.0, temperature=2.0), **settings)
    excess = hot.draw_losses - hot.initial_loss
    torch.testing.assert_close(fs.llc_draws(hot), 1.5 * excess)
    same = run(fs.sgld(1e-3, nbeta=3.0, noise_level=2**0.5), **settings)
    torch.testing.assert_close(fs.llc_draws(same), fs.llc_draws(hot))
    with pytest.raises(ValueError, match="temperature must be > 0 at the draws, got 0"):
        fs.llc(run(fs.sgld(1e-3, nbeta=3.0, temperature=0.0), **settings))


def test_settings_of_schedules_are_in_the_record():
    pytest.importorskip("arviz_base")
    sampler = fs.sgld(fs.schedules.cosine(1e-3, num_steps=9), nbeta=3.0)
    attrs = fs.to_datatree(run(sampler))["posterior"].attrs
    assert attrs["lr"] == "Cosine"
    assert attrs["lr.start"] == 1e-3
    assert attrs["preconditioner"] == "Identity"
