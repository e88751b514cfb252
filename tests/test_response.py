"""Responses of a posterior, where they are known: linear regression with Gaussian noise.

With w ~ N(w₀, Σ), Σ = (nβ H + γ)⁻¹, H = Σ_i x_i x_iᵀ/n, residuals r_i at w₀, and s_ij = x_iᵀ Σ x_j,

    ℓ_i = ½ (r_i + x_iᵀ δ)²,    Cov(ℓ_i, ℓ_j) = r_i r_j s_ij + ½ s_ij²,    E ℓ_i − ℓ_i(w₀) = ½ s_ii.
"""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import funcsgmcmc as fs
from funcsgmcmc.estimates.batch_means import BatchMeans, batches_of
from funcsgmcmc.estimates.response import (
    Response,
    functional_variance,
    influence,
    llc_shares,
    susceptibilities,
)
from funcsgmcmc.per_example import losses_on
from funcsgmcmc.runs.restricted import sample_components

N, D, NBETA, GAMMA = 12, 4, 6.0, 1.5


def losses(params, batch) -> Tensor:
    inputs, targets = batch
    return (inputs @ params["w"] - targets) ** 2 / 2


def loss(params, batch) -> Tensor:
    return losses(params, batch).mean()


@dataclass
class Regression:
    """Data, the least-squares solution, and the exact moments of a component of the weights."""

    data: tuple[Tensor, Tensor]
    solution: Tensor

    def spread(self, component: slice = slice(None)) -> Tensor:
        """s_ij, `[n, n]`, with the weights of a component alone sampled."""
        inputs = self.data[0][:, component]
        precision = NBETA * inputs.T @ inputs / N + GAMMA * torch.eye(inputs.shape[1])
        return inputs @ torch.linalg.solve(precision, inputs.T)

    def covariance(self) -> Tensor:
        residuals, s = self.residuals(), self.spread()
        return residuals[:, None] * residuals * s + s**2 / 2

    def residuals(self) -> Tensor:
        return self.data[0] @ self.solution - self.data[1]

    def susceptibility(self, component: slice) -> Tensor:
        """χ_i, `[n]`: φ = ½ mean_i (x_iᵀ δ)², whose covariance with ℓ_i is ½ mean_j s_ij²."""
        here, full = self.spread(component), self.spread()
        with_each = (here**2).mean(1) / 2
        rise = here.diagonal().mean() / 2
        moved = [(each.diagonal().mean() - each.diagonal()) / 2 for each in (here, full)]
        return with_each.mean() - with_each + rise * (moved[0] - moved[1])


def regression() -> Regression:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, D, generator=generator) * torch.tensor([2.0, 1.0, 1.0, 0.5])
    targets = inputs.sum(1) + torch.randn(N, generator=generator)
    solution = torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]
    torch.set_default_dtype(torch.float32)
    return Regression((inputs, targets), solution)


PROBLEM = regression()
START = {"w": PROBLEM.solution}
# BAOA samples a quadratic's covariance exactly, at any step size.
SAMPLER = fs.baoa(0.25, friction=2.0, nbeta=NBETA, localization=GAMMA)
OBSERVABLES = {
    "losses": losses_on(losses, PROBLEM.data),
    "weights": lambda params: params["w"],
    "half": losses_on(losses, tuple(leaf[:5] for leaf in PROBLEM.data)),
}


def sampled(**settings) -> fs.Samples:
    options = {
        "num_chains": 400,
        "num_draws": 60,
        "num_burnin_steps": 40,
        "num_steps_between_draws": 2,
        "key": fs.key(4),
        "observables": OBSERVABLES,
    }
    return fs.sample(loss, START, PROBLEM.data, SAMPLER, **(options | settings))


@pytest.fixture(scope="module")
def many() -> fs.Samples:
    """Many chains: their own spread is the error that a mean over them has."""
    torch.set_default_dtype(torch.float64)
    return sampled()


def check(found: Response, expected: Tensor) -> None:
    """Compare with exact values; and the error with that which is due."""
    z = (found.values - expected) / found.mcse
    assert z.shape == expected.shape
    assert z.abs().max() < 4.8, z.abs().max()  # of 144, once in 4,000 where all are right
    assert 0.75 < z.square().mean().sqrt() < 1.35 or z.numel() < 40


def test_influence_of_examples_on_each_other(many):
    check(influence(many, "losses"), -PROBLEM.covariance())
    found = influence(many, "losses", center="chain")
    check(found, -PROBLEM.covariance())
    exact = PROBLEM.covariance()
    deviations = exact.diagonal().sqrt()
    for center in ("pooled", "chain"):
        correlation = influence(many, "losses", normalized=True, center=center)
        assert torch.allclose(correlation.values.diagonal(), torch.ones(N))
        away = ~torch.eye(N, dtype=torch.bool)
        check(
            Response(correlation.values[away], correlation.mcse[away], 400, 0),
            (exact / deviations / deviations[:, None])[away],
        )


def test_influence_on_another_observable(many):
    inputs, _ = PROBLEM.data
    precision = NBETA * inputs.T @ inputs / N + GAMMA * torch.eye(D)
    with_weights = PROBLEM.residuals()[:, None] * torch.linalg.solve(precision, inputs.T).T
    check(influence(many, "losses", "weights"), -with_weights)
    found = influence(many, "losses", many.observables["weights"][..., 1])
    check(found, -with_weights[:, 1])
    check(influence(many, "losses", "half"), -PROBLEM.covariance()[:, :5])


def test_functional_variance_and_shares(many):
    check(functional_variance(many, "losses"), PROBLEM.covariance().diagonal().sum())
    start = OBSERVABLES["losses"](many.sampler.anchor)
    shares = llc_shares(many, "losses", start)
    check(shares, NBETA / N * PROBLEM.spread().diagonal() / 2)
    # All data is every step's batch: their sum is the learning coefficient of the run.
    assert float(shares.values.sum()) == pytest.approx(fs.llc(many).mean, rel=1e-4)


def test_susceptibilities_of_components():
    components = {"full": None, "front": {"w": slice(0, 2)}, "back": {"w": torch.tensor([2, 3])}}
    runs = sample_components(
        loss,
        START,
        PROBLEM.data,
        SAMPLER,
        components,
        num_chains=400,
        num_draws=60,
        num_burnin_steps=40,
        num_steps_between_draws=2,
        key=fs.key(5),
        observables={"losses": OBSERVABLES["losses"], "half": OBSERVABLES["half"]},
    )
    exact = torch.stack([PROBLEM.susceptibility(each) for each in (slice(0, 2), slice(2, 4))])
    found = susceptibilities(runs, "losses")
    assert found.components == ("front", "back")
    check(found, exact)
    check(susceptibilities(runs, "half", loss="losses"), exact[:, :5])
    # The learning coefficient of a component, too.
    hessian = NBETA * PROBLEM.data[0].T @ PROBLEM.data[0] / N
    for name, part in (("front", slice(0, 2)), ("back", slice(2, 4))):
        block = hessian[part, part]
        truth = torch.linalg.solve(block + GAMMA * torch.eye(2), block).trace() / 2
        estimate = fs.llc(runs[name])
        assert abs(estimate.mean - float(truth)) < 4 * estimate.mcse
    # The full run's share of the error: many components' chains, and few of the whole network.
    few = [runs | {"full": runs["full"][8 * i : 8 * i + 8]} for i in range(50)]
    each = [susceptibilities(some, "losses") for some in few]
    spread = torch.stack([one.values for one in each]).var(0).mean()
    stated = (
        torch.stack([one.mcse.square() for one in each]).mean((0, 1, 2))
        - found.mcse.square().mean()
    )
    assert float(stated / spread) == pytest.approx(1.0, rel=0.2)
    wrong = susceptibilities(runs, "losses", initial_loss=float(runs["full"].initial_loss) + 0.1)
    assert (wrong.values - found.values).abs().max() > 0.01


def test_the_error_of_a_correlation(many):
    """Of independent normals, (1 − ρ²)/√N: large correlations are known better than covariances."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 400, 60, 30, generator=generator)
    two = 0.9 * one + math.sqrt(1 - 0.81) * other
    samples = dataclasses.replace(many, observables={"x": one})
    for center in ("pooled", "chain"):
        found = influence(samples, "x", two, normalized=True, center=center)
        due = (1 - 0.81) / math.sqrt(400 * 60)
        mcse = found.mcse.diagonal().square().mean().sqrt()
        assert float(mcse) == pytest.approx(due, rel=0.05)
        z = (found.values.diagonal() - 0.9) / due
        assert 0.6 < float(z.square().mean()) < 1.6


@pytest.mark.slow
@pytest.mark.parametrize("num_chains", [4, 16])
def test_errors_cover_in_95_of_100_runs(num_chains):
    """200 runs, as groups of the chains of one."""
    runs = 200
    samples = sampled(
        num_chains=runs * num_chains,
        num_draws=6400 // num_chains,
        num_steps_between_draws=3,
        observables={"losses": OBSERVABLES["half"]},
    )
    exact = PROBLEM.covariance()[:5, :5]
    deviations = exact.diagonal().sqrt()
    labels = [run for run in range(runs) for _ in range(num_chains)]
    covered = {"covariance": [], "correlation": [], "variance": []}
    for group in samples.groups(labels).values():
        one = influence(group, "losses")
        covered["covariance"].append((one.values + exact).abs() < 1.96 * one.mcse)
        two = influence(group, "losses", normalized=True)
        near = (two.values - exact / deviations / deviations[:, None]).abs() < 1.96 * two.mcse
        covered["correlation"].append(near[~torch.eye(5, dtype=torch.bool)])
        three = functional_variance(group, "losses")
        covered["variance"].append((three.values - exact.trace()).abs() < 1.96 * three.mcse)
    for name, each in covered.items():
        share = float(torch.stack(each).double().mean())
        assert 0.92 < share < 0.98, (name, share)


def of_batches(values: Tensor) -> BatchMeans:
    """Of draws `[C, D]`, as estimates take them in."""
    found = BatchMeans()
    for chain in values:
        for batch in batches_of(*values.shape):
            found.add(chain[batch].mean(), len(chain[batch]))
        found.end_chain()
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (2, 50), (5, 7), (40, 30), (100, 2), (70, 1)])
def test_batches_are_all_the_draws(shape):
    batches = batches_of(*shape)
    assert [i for batch in batches for i in range(batch.start, batch.stop)] == list(range(shape[1]))
    values = 1e6 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = of_batches(values)
    assert float(found.mean) == pytest.approx(float(values.mean()), rel=1e-12)
    means = torch.stack([values[:, batch].mean(1) for batch in batches], 1)
    number = means.numel()
    if shape[0] > 1:
        between = means.mean(1).std() / shape[0] ** 0.5
        assert float(found.mcse_between) == pytest.approx(float(between), rel=1e-6)
    if len(batches) > 1:
        within = (means.var(1).mean() / number).sqrt()
        assert float(found.mcse_within) == pytest.approx(float(within), rel=1e-6)
    if min(shape[0], len(batches)) > 1:
        assert float(found.mcse) == pytest.approx(float(means.std() / number**0.5), rel=1e-6)
    assert bool(found.mcse.isnan()) == (number == 1)


def test_chains_that_have_not_mixed_have_the_error_between_them():
    values = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    values += 3 * torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
    found = of_batches(values)
    assert torch.equal(found.mcse, found.mcse_between)
    assert found.mcse > 10 * found.mcse_within


def test_an_opened_store_and_moments_give_the_same(tmp_path):
    settings = {"num_chains": 6, "num_draws": 20}
    one = sampled(**settings)
    stored = fs.open_run((sampled(**settings, store=tmp_path / "run"), tmp_path / "run")[1])
    moments = sampled(**settings, record=["observable_moments"])
    assert moments.observables == {}
    for arguments in (("losses",), ("losses", "weights"), ("losses", "half")):
        for options in ({}, {"normalized": True}, {"center": "chain"}):
            direct = influence(one, *arguments, **options)
            again = influence(stored, *arguments, **options)
            torch.testing.assert_close(again.values, direct.values, rtol=0, atol=0)
            streamed = influence(moments, *arguments, **options)
            torch.testing.assert_close(streamed.values, direct.values, rtol=1e-4, atol=1e-6)
            blocks = influence(one, *arguments, block_size=5, **options)
            torch.testing.assert_close(blocks.values, direct.values)
            torch.testing.assert_close(blocks.mcse, direct.mcse)
    # Of moments, errors are those between chains.
    means = one.observables["losses"].double()
    away = means - means.mean((0, 1))
    per_chain = torch.einsum("cdi,cdj->cij", away, away) / 19.8333
    between = per_chain.std(0) / 6**0.5
    torch.testing.assert_close(influence(moments, "losses").mcse, between, rtol=1e-3, atol=1e-6)


def test_tokens_and_their_examples():
    """Sequences are means over the tokens that there are."""
    mask = torch.ones(N, 3, dtype=torch.bool)
    mask[2, 1:] = False
    weights = torch.tensor([1.0, 2.0, -0.5])

    def of_tokens(params, batch):
        return losses(params, batch)[:, None] * weights

    tokens = losses_on(of_tokens, PROBLEM.data, mask=mask)
    samples = sampled(num_chains=8, num_draws=20, observables={"tokens": tokens})
    trace = samples.observables["tokens"].double()
    flat = trace.reshape(160, -1)
    by_token = influence(samples, "tokens", per="token", block_size=7)
    assert by_token.values.shape == (N, 3, N, 3)
    expected = -torch.cov(flat.T).reshape(N, 3, N, 3)
    torch.testing.assert_close(by_token.values, expected, equal_nan=True)
    assert torch.equal(by_token.values[0, 0].isnan(), ~mask)
    by_example = influence(samples, "tokens")
    torch.testing.assert_close(by_example.values, -torch.cov(trace.nanmean(-1).reshape(160, N).T))
    total = functional_variance(samples, "tokens").values
    torch.testing.assert_close(total, flat.var(0).nansum())
    start = tokens(samples.sampler.anchor)
    shares = llc_shares(samples, "tokens", start, per="token").values
    assert torch.equal(shares.isnan(), ~mask)
    together = llc_shares(samples, "tokens", start).values
    torch.testing.assert_close(together, shares.nansum(-1))
    rise = (trace - start).nansum((-1, -2)).mean() / mask.sum()
    torch.testing.assert_close(together.sum(), NBETA * rise)


def test_frozen_chains_are_left_out():
    """Chain 1 fails at once, chain 3 later; nothing of them is in any estimate."""
    lr = torch.tensor([0.05, 1e300, 0.05, 0.05, 0.05])
    sampler = fs.sgld(lr, nbeta=NBETA, localization=GAMMA)

    def poisoned(params, batch):
        return loss(params, batch)

    samples = fs.sample(
        poisoned,
        START,
        PROBLEM.data,
        sampler,
        num_chains=5,
        num_draws=30,
        key=fs.key(0),
        observables={"losses": OBSERVABLES["losses"]},
        max_loss=None,
    )
    assert samples.healthy.tolist() == [True, False, True, True, True]
    good = samples[samples.healthy]
    found, expected = influence(samples, "losses"), influence(good, "losses")
    assert (found.num_chains, found.num_frozen) == (4, 1)
    assert "4 chains, 1 frozen and left out" in str(found)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0)
    assert found.values.isfinite().all()
    assert str(functional_variance(samples, "losses")).endswith("(4 chains, 1 frozen and left out)")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda s: influence(s, "loss"),
            ValueError,
            "of must be an observable.* got 'loss', where",
        ),
        (lambda s: influence(s, "half", "x"), ValueError, "on must be an observable whose values"),
        (lambda s: influence(s, 3), TypeError, "of must be the name of an observable"),
        (
            lambda s: influence(s, "half", torch.ones(2)),
            ValueError,
            r"on must have values \[chains",
        ),
        (
            lambda s: influence(s, "half", per="word"),
            ValueError,
            "per must be one of 'example', 'token', got 'word'",
        ),
        (lambda s: influence(s, "half", center="x"), ValueError, "center must be"),
        (lambda s: influence(s, "half", block_size=0), ValueError, "block_size must be >= 1"),
        (lambda s: influence(3, "half"), TypeError, "samples must be a Samples"),
        (lambda s: llc_shares(s, "half", torch.ones(3)), ValueError, r"of shape \(5,\), got"),
        (lambda s: llc_shares(s, "half", 3.0), TypeError, "initial_losses must be a Tensor"),
        (lambda s: susceptibilities({"a": s}, "half"), ValueError, "runs must have 'full', the"),
        (lambda s: susceptibilities({"full": s}, "half"), ValueError, "must have a component"),
        (lambda s: susceptibilities(s, "half"), TypeError, "runs must be a Mapping"),
        (
            lambda s: susceptibilities({"full": s, "a": s}, "half", initial_loss=math.nan),
            ValueError,
            "initial_loss must be finite",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    samples = sampled(num_chains=2, num_draws=4)
    with pytest.raises(error, match=message):
        call(samples)


def test_one_draw_has_no_covariance():
    samples = sampled(num_chains=1, num_draws=1)
    with pytest.raises(ValueError, match="two draws at least, got 1"):
        influence(samples, "losses")
    two = sampled(num_chains=2, num_draws=1)
    with pytest.raises(ValueError, match="two draws a chain at least, got 1"):
        influence(two, "losses", center="chain")
    assert influence(two, "losses").values.isfinite().all()
