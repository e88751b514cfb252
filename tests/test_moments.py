"""Moments of draws: those of the draws themselves, in memory that stays the same."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import funcsgmcmc as fs
from cases import BY_NAME, CASES, Case
from funcsgmcmc import tree
from funcsgmcmc.runs.moments import DrawMoments, Moments, ObservableMoments
from problems import observables, run

KINDS = [DrawMoments, ObservableMoments]


def draws_of(num_chains: int, num_draws: int, seed: int) -> tuple[TensorDict, torch.Tensor]:
    """Values of two quantities, `[C, D, …]`, and log weights, `[C, D]`, some of them extreme."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        "vector": torch.randn(num_chains, num_draws, 3, generator=generator) * 1e3 + 1e5,
        "number": torch.randn(num_chains, num_draws, generator=generator),
    }
    log_weights = 30 * torch.randn(num_chains, num_draws, generator=generator)
    return TensorDict(values, batch_size=[num_chains, num_draws]), log_weights


def accumulated(
    kind: type[Moments], values: TensorDict, log_weights: torch.Tensor | None
) -> Moments:
    parts = []
    for draw in range(values.batch_size[1]):
        weight = None if log_weights is None else log_weights[:, draw]
        counts = torch.ones(values.batch_size[0], dtype=torch.bool)
        parts.append(kind.of_draw(values[:, draw], counts, weight))
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    return total


def check_moments(moments: Moments, values: TensorDict, log_weights: torch.Tensor | None) -> None:
    """Compare the moments of one set of draws, `[]`, with those of their values `[D, …]`."""
    size = values.batch_size[0]
    weights = torch.zeros(size) if log_weights is None else log_weights
    share = torch.softmax(weights, 0)
    means = {name: torch.tensordot(share, leaf, 1) for name, leaf in tree.leaves(values)}
    away = {name: leaf - means[name] for name, leaf in tree.leaves(values)}
    assert int(moments.count) == size
    torch.testing.assert_close(moments.log_weight, torch.logsumexp(weights, 0))
    for name, mean in means.items():
        torch.testing.assert_close(moments.means[name], mean)
        if isinstance(moments, DrawMoments):
            expected = torch.tensordot(share, away[name] ** 2, 1)
            torch.testing.assert_close(moments.variances[name], expected, rtol=1e-6, atol=1e-7)
    if isinstance(moments, ObservableMoments):
        for f, g in itertools.product(away, repeat=2):
            rows, columns = away[f].reshape(size, -1), away[g].reshape(size, -1)
            expected = torch.einsum("d,di,dj->ij", share, rows, columns)
            block = moments.covariances[f, g]
            assert block.shape == away[f].shape[1:] + away[g].shape[1:]
            torch.testing.assert_close(
                block.reshape(expected.shape), expected, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(num_chains=st.integers(1, 4), num_draws=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_moments_are_those_of_the_values(kind, weighted, num_chains, num_draws, seed):
    """Of each chain, of all chains pooled, and of two parts of a run merged."""
    values, log_weights = draws_of(num_chains, num_draws, seed)
    weights = log_weights if weighted else None
    moments = accumulated(kind, values, weights)
    for chain in range(num_chains):
        check_moments(moments[chain], values[chain], None if weights is None else weights[chain])
    every = values.reshape(-1)
    check_moments(moments.pooled(), every, None if weights is None else weights.reshape(-1))
    cut = num_draws // 2
    if cut:
        parts = [
            accumulated(kind, values[:, rows], None if weights is None else weights[:, rows])
            for rows in (slice(0, cut), slice(cut, None))
        ]
        check_moments(
            parts[0].merged(parts[1]).pooled(),
            every,
            None if weights is None else weights.reshape(-1),
        )


@pytest.mark.parametrize("how", [{}, {"chain_method": "loop"}, {"chunk_size": 2}], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_takes_the_moments_of_its_draws(case: Case, how, params):
    """Also with weights, and with the observables of chunks and of single chains."""
    settings = {"num_chains": 3, "observables": observables(), "num_burnin_steps": 2} | how
    sampler = case.make(params)
    kept = run(sampler, record=["draws"], **settings)
    moments = run(sampler, record=["draw_moments", "observable_moments"], **settings)
    assert (moments.draws, moments.observables) == (None, {})
    for chain in range(3):
        weights = None if kept.log_weights is None else kept.log_weights[chain]
        check_moments(moments.draw_moments[chain], kept.draws[chain], weights)
        observed = TensorDict(kept.observables, batch_size=[3, 6])[chain]
        check_moments(moments.observable_moments[chain], observed, weights)
    assert moments[1:].draw_moments.batch_size == (2,)


def test_draws_count_until_their_chain_is_frozen(params):
    """Chain 1 takes steps that are too long; the others do not notice."""
    sampler = fs.sgld(torch.tensor([1e-3, 1e300, 1e-3]), nbeta=3.0, localization=1.0)
    settings = {"num_chains": 3, "num_draws": 8}
    samples = run(sampler, record=["draws", "draw_moments"], **settings)
    (frozen,) = samples.frozen
    assert frozen.chain == 1
    counted = int((samples.draw_steps < frozen.step).sum())
    assert samples.draw_moments.count.tolist() == [8, counted, 8]
    check_moments(samples.draw_moments[1], samples.draws[1, :counted], None)
    healthy = samples.draw_moments[samples.healthy].pooled()
    check_moments(healthy, samples.draws[samples.healthy].reshape(-1), None)


def test_moments_of_a_run_that_goes_on_are_merged(params):
    sampler = fs.sgld(1e-3, nbeta=10.0)
    settings = {"num_chains": 3, "record": ["draws", "draw_moments"]}
    first = run(sampler, **settings)
    both = first.joined(run(sampler, first, init_noise=0.0, **settings))
    for chain in range(3):
        check_moments(both.draw_moments[chain], both.draws[chain], None)
    bare = run(sampler, first, init_noise=0.0, num_chains=3, record=["draws"])
    with pytest.raises(ValueError, match="both runs must have recorded moments, got those of one"):
        first.joined(bare)


def test_moments_before_the_first_draw(params):
    """A run that fails in burn-in has none."""

    def loss(params, batch):
        loss.calls += 1
        if loss.calls > 8:
            raise OSError("the network is down")
        return params["w"].square().sum()

    loss.calls = 0
    with pytest.raises(fs.SamplingError) as caught:
        run(
            fs.sgld(1e-3, nbeta=1.0),
            TensorDict({"w": torch.ones(2)}, batch_size=[]),
            loss_fn=loss,
            data=torch.zeros(4, 1),
            batch_size=None,
            num_burnin_steps=50,
        )
    assert caught.value.samples.draw_moments is None


def test_integers_and_narrow_numbers_are_averaged_in_wide_ones():
    values = TensorDict(
        {"count": torch.tensor([[3], [4]]), "half": torch.ones(2, 1, dtype=torch.bfloat16)},
        batch_size=[2],
    )
    moments = DrawMoments.of_draw(values, torch.ones(2, dtype=torch.bool))
    assert moments.means["count"].dtype == torch.float64
    assert moments.means["half"].dtype == torch.float32
    assert moments.pooled().means["count"].item() == 3.5


def test_what_cannot_be_merged_or_pooled():
    values, _ = draws_of(2, 1, 0)
    moments = accumulated(DrawMoments, values, None)
    with pytest.raises(ValueError, match=r"must be those of chains \[C\], got of shape \(\)"):
        moments.pooled().pooled()
    with pytest.raises(TypeError, match="other must be a DrawMoments, got ObservableMoments"):
        moments.merged(accumulated(ObservableMoments, values, None))
    with pytest.raises(ValueError, match="means"):
        moments.merged(accumulated(DrawMoments, values.select("number"), None))


def test_memory_does_not_grow_with_the_number_of_draws():
    """All that a run keeps of its draws: as many bytes after 50 draws as after 5."""
    sizes = []
    for num_draws in (5, 50):
        samples = run(
            BY_NAME["sgld"].make(None),
            num_draws=num_draws,
            observables=observables(),
            record=["draw_moments", "observable_moments"],
        )
        kept = (samples.draw_moments, samples.observable_moments)
        sizes.append(
            sum(leaf.numel() * leaf.itemsize for each in kept for leaf in each.values(True, True))
        )
        assert samples.draws is None
    assert sizes[0] == sizes[1]
