"""Limits on loss and distance, the distance of each step, and the callback at each draw."""

import pytest
import torch

import funcsgmcmc as fs
from cases import CASES, Case
from funcsgmcmc import tree
from problems import observables, run

HOWS = [{}, {"chunk_size": 2}, {"chain_method": "loop"}]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_step_records_its_distance(case: Case, how, params):
    """‖w − w₀‖ at the parameters that the step's loss belongs to; metrics say the same."""
    sampler = case.make(params)
    samples = run(sampler, record=["draws"], num_burnin_steps=2, **how)
    away = samples.draws.apply(
        lambda draw, start: draw - start,
        samples.sampler.anchor[:, None].expand(5, 6)
        if samples.sampler.anchor.batch_size
        else samples.sampler.anchor.expand(5, 6),
    )
    at_draws = samples.distances[:, samples.draw_rows]
    torch.testing.assert_close(at_draws, tree.norm(away))
    measured = run(sampler, record=["metrics"], num_burnin_steps=2, **how)
    torch.testing.assert_close(measured.metrics.distance, measured.distances, rtol=0, atol=0)
    torch.testing.assert_close(measured.distances, samples.distances)


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("quantity", ["loss", "distance"])
def test_a_chain_beyond_a_limit_is_frozen_where_it_was(quantity, how):
    """Above the largest value of all other chains: one chain is lost, the others stay the same."""
    sampler = fs.sgld(torch.tensor([1e-4, 1e-4, 3e-2, 1e-4]), nbeta=10.0)
    settings = {"num_chains": 4, "num_draws": 40, "init_noise": 0.0} | how
    free = run(sampler, **settings)
    values = {"loss": free.losses, "distance": free.distances}[quantity]
    limit = float(values[[0, 1, 3]].max()) + 1e-6
    assert values[2].max() > limit
    limited = run(sampler, **{f"max_{quantity}": limit}, **settings)
    step = int((values[2] > limit).nonzero()[0])
    (frozen,) = limited.frozen
    assert (frozen.chain, frozen.step) == (2, step)
    value = float(values[2, step])
    assert frozen.reason == f"{quantity} is {value:g}, above max_{quantity}={limit:g}"
    # The failing step reports what was wrong, and the chain stays where it was before it.
    torch.testing.assert_close(limited.losses[2, : step + 1], free.losses[2, : step + 1])
    assert limited.losses[2, step + 1 :].isnan().all()
    assert limited.distances[2, step + 1 :].isnan().all()
    others = [0, 1, 3]
    for one, other in zip(limited[others].draws.values(), free[others].draws.values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(fs.DivergenceError, match=f"{quantity} is .*, above max_{quantity}="):
        run(sampler, on_divergence="raise", **{f"max_{quantity}": limit}, **settings)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_callback_sees_each_draw(how):
    """All of it, as it was recorded, in order; its result is of no consequence."""
    seen = []
    sampler = fs.sgld(1e-3, nbeta=10.0)
    settings = {"num_burnin_steps": 3, "num_steps_between_draws": 2, "observables": observables()}
    samples = run(sampler, on_draw=seen.append, **settings, **how)
    assert [draw.index for draw in seen] == list(range(6))
    assert [draw.step for draw in seen] == samples.draw_steps.tolist()
    for index, draw in enumerate(seen):
        row = int(samples.draw_rows[index])
        assert torch.equal(draw.losses, samples.losses[:, row])
        assert torch.equal(draw.distances, samples.distances[:, row])
        assert draw.healthy.all()
        for name, values in samples.observables.items():
            assert torch.equal(draw.observables[name], values[:, index])
        for name, leaf in tree.leaves(draw.params):
            assert torch.equal(leaf, samples.draws[name][:, index])


def test_an_error_in_the_callback_leaves_the_record():
    def fail(draw):
        if draw.index == 2:
            raise OSError("the display is gone")

    with pytest.raises(fs.SamplingError, match="the display is gone") as caught:
        run(fs.sgld(1e-3, nbeta=10.0), on_draw=fail)
    assert caught.value.samples.num_draws == 3
    assert caught.value.__notes__ == ["This happened when on_draw was called with draw 2."]
