"""Restricted chains: a part of a network is sampled, and the rest is held once."""

import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.components import restrict
from funcsgmcmc.per_example import losses_on
from funcsgmcmc.runs.restricted import sample_components
from problems import assert_same, classification, run

torch.set_default_dtype(torch.float64)  # as the tests have it
MODEL, DATA = classification()
torch.set_default_dtype(torch.float32)
LOSS = fs.module_loss(MODEL, cross_entropy)
LOSSES = fs.module_loss(MODEL, partial(cross_entropy, reduction="none"))
SAMPLER = fs.sgld(1e-3, nbeta=10.0, localization=1.0)
ROWS = torch.tensor([0, 3, 4])
CUTS = {
    "0.weight": slice(1, 4),
    "0.bias": ROWS,
    "2.weight": (slice(None), ROWS),
    "2.bias": torch.tensor([True, False, True]),
}


def whole() -> TensorDict:
    return fs.params_of(MODEL)


def test_a_pattern_gives_the_chains_of_the_smaller_tree():
    loss, start = restrict(LOSS, whole(), "2.*")
    settings = {"num_draws": 4, "record": ["draws"]}
    restricted = run(SAMPLER, start, loss_fn=loss, **settings)
    assert_same(restricted, run(SAMPLER, fs.params_of(MODEL, "2.*"), **settings), exact=True)
    by_name = restrict(LOSS, whole(), lambda name, leaf: leaf.ndim == 1).params
    assert set(by_name.keys()) == {"0.bias", "2.bias"}


def test_entries_move_as_under_a_mask():
    """Without noise, whose numbers another tree has others of."""
    mask = {name: torch.zeros_like(leaf) for name, leaf in whole().items()}
    for name, index in CUTS.items():
        mask[name][index] = 1.0
    settings = {"num_draws": 20, "batch_size": None, "init_noise": 0.0, "record": ["draws"]}
    masked = run(
        fs.sgld(1e-2, nbeta=10.0, localization=1.0, noise_level=0.0, mask=mask), **settings
    )
    loss, start = restrict(LOSS, whole(), CUTS)
    assert {name: tuple(leaf.shape) for name, leaf in start.items()} == {
        "0.weight": (3, 5),
        "0.bias": (3,),
        "2.weight": (3, 3),
        "2.bias": (2,),
    }
    sampler = fs.sgld(1e-2, nbeta=10.0, localization=1.0, noise_level=0.0)
    restricted = run(sampler, start, loss_fn=loss, **settings)
    torch.testing.assert_close(restricted.losses, masked.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(restricted.distances, masked.distances, rtol=1e-9, atol=1e-12)
    last = loss.whole(restricted.draws[2, -1])
    for name, leaf in masked.draws[2, -1].items():
        torch.testing.assert_close(last[name], leaf, rtol=1e-11, atol=0)


def test_frozen_weights_are_held_once():
    """Not copied when the loss is made, nor by chains; what is sampled is a copy."""
    params = whole()
    loss, start = restrict(LOSS, params, {"2.weight": slice(0, 1), "2.bias": True})
    seen = loss.whole(start)
    for name in ("0.weight", "0.bias"):
        assert seen[name].data_ptr() == params[name].data_ptr()
    shapes = []

    def spy(params, batch):
        # Under vmap, a leaf without chains is no batched tensor.
        shapes.append({n: torch._C._functorch.is_batchedtensor(v) for n, v in params.items()})
        return LOSS(params, batch)

    loss, start = restrict(spy, params, "2.*")
    torch.vmap(loss, in_dims=(0, None))(start.expand(4).clone(), DATA)
    assert shapes == [{"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}]
    before = params.clone()
    start["2.bias"].add_(1.0)
    assert (params == before).all()


def test_a_restricted_run_is_stored_and_resumed(tmp_path):
    """And one with other frozen weights is another run."""
    observables = {"train": restrict(losses_on(LOSSES, DATA), whole(), CUTS).function}
    loss, start = restrict(LOSS, whole(), CUTS)
    settings = {"observables": observables, "store": tmp_path / "run", "resume": True}
    run(SAMPLER, start, loss_fn=loss, num_draws=3, **settings)
    longer = run(SAMPLER, start, loss_fn=loss, num_draws=6, **settings)
    del settings["store"], settings["resume"]
    assert_same(longer, run(SAMPLER, start, loss_fn=loss, num_draws=6, **settings), exact=True)
    other, _ = restrict(LOSS, whole() * 2, CUTS)
    with pytest.raises(ValueError, match=r"params\['0.weight'\]"):
        run(
            SAMPLER,
            start,
            loss_fn=other,
            num_draws=6,
            store=tmp_path / "run",
            resume=True,
            **settings,
        )


def test_components_are_sampled_in_one_call(tmp_path):
    components = {"full": None, "first": "0.*", "rows": CUTS}
    settings = {"num_chains": 3, "num_draws": 4, "batch_size": 8, "key": fs.key(0)}
    runs = sample_components(
        LOSS,
        whole(),
        DATA,
        SAMPLER,
        components,
        observables={"train": losses_on(LOSSES, DATA)},
        store=tmp_path / "all",
        **settings,
    )
    assert list(runs) == ["full", "first", "rows"]
    assert [each.chains.tolist() for each in runs.values()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    loss, start = restrict(LOSS, whole(), CUTS)
    alone = fs.sample(loss, start, DATA, SAMPLER, chain_offset=6, **settings)
    torch.testing.assert_close(runs["rows"].losses, alone.losses, rtol=0, atol=0)
    for name, each in runs.items():
        opened = fs.open_run(tmp_path / "all" / name)
        torch.testing.assert_close(opened.observables["train"], each.observables["train"])
        assert each.observables["train"].shape == (3, 4, 40)


def test_components_that_are_complete_are_handed_over():
    """With the error that ends a later one."""

    def loss(params, batch):
        if params["0.weight"].shape == (3, 5) or len(batch[1]) != 8:
            pass
        loss.calls += 1
        if loss.calls > 90:
            raise OSError("the disk is gone")
        return LOSS(params, batch)

    loss.calls = 0
    with pytest.raises(fs.SamplingError, match="the disk is gone") as caught:
        sample_components(
            loss,
            whole(),
            DATA,
            SAMPLER,
            {"first": "0.*", "second": "2.*"},
            num_chains=2,
            num_draws=50,
            batch_size=8,
            full_loss=0,
            key=fs.key(0),
        )
    error = pickle.loads(pickle.dumps(caught.value))
    assert list(error.finished) == ["first"]
    assert error.finished["first"].num_draws == 50
    assert 0 < error.samples.num_draws < 50
    assert "This happened in component 'second'." in caught.value.__notes__


@pytest.mark.parametrize(
    ("component", "error", "message"),
    [
        ("9.*", ValueError, r"component='9.\*' must match a parameter, got none of 0.weight"),
        ([], ValueError, "component must hold at least one pattern"),
        ({}, ValueError, "component must name at least one leaf"),
        (None, TypeError, "component must be patterns, a function or a dict"),
        (3, TypeError, "component must be patterns of names or a function"),
        ({"9": True}, ValueError, "component has unknown leaf '9'; parameters are 0.weight"),
        ({"0.bias": 3}, TypeError, r"component\['0.bias'\] must be True, a slice, a tensor"),
        ({"0.bias": False}, TypeError, r"component\['0.bias'\] must be True"),
        ({"0.bias": torch.ones(2)}, TypeError, "must hold indices or booleans, got torch.float32"),
        ({"0.bias": slice(3, 3)}, ValueError, "must have at least one entry, got none"),
        ({"0.bias": torch.tensor([7])}, ValueError, r"must be within 6 entries, got \[7\]"),
        ({"0.bias": torch.tensor([1, 1])}, ValueError, r"name each entry once, got \[1, 1\]"),
        ({"0.bias": torch.tensor([True])}, ValueError, "must have 6 booleans, got 1"),
        ({"0.bias": (slice(2), slice(2))}, ValueError, "must index 1 dimensions at most, got 2"),
        ({"0.weight": (slice(2), slice(2))}, ValueError, "must cut one dimension, got 2"),
    ],
)
def test_what_is_no_component(component, error, message):
    with pytest.raises(error, match=message):
        restrict(LOSS, whole(), component)


def test_what_cannot_be_restricted():
    with pytest.raises(TypeError, match="function must be a loss, got an estimator"):
        restrict(fs.control_variates(LOSS), whole(), "0.*")
    with pytest.raises(ValueError, match=r"params must be those of one chain, got \(2,\)"):
        restrict(LOSS, whole().expand(2), "0.*")
    loss, start = restrict(LOSS, whole(), {"0.bias": slice(2)})
    with pytest.raises(ValueError, match=r"params\['0.bias'\] has shape \(6,\), the component's"):
        loss(whole().select("0.bias"), DATA)
    with pytest.raises(ValueError, match=r"must have the leaves of the component, 0.bias, got 2"):
        loss(whole().select("2.bias"), DATA)
    for bad in ("a/b", "..", "", "."):
        with pytest.raises(ValueError, match="components must have names that a folder can have"):
            sample_components(
                loss, start, DATA, SAMPLER, {bad: None}, num_chains=1, num_draws=1, key=fs.key(0)
            )


def test_control_variates_of_a_component():
    """The estimator goes around the restricted loss."""
    loss, start = restrict(LOSS, whole(), CUTS)
    samples = run(SAMPLER, start, loss_fn=fs.control_variates(loss), num_draws=3)
    assert samples.healthy.all()
