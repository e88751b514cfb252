"""Responses against the published package's own functions, on the same traces.

Its `slt` imports a library of data sets for annotations alone, which is stood in for here.
"""

import math
import sys
import types

import pytest
import torch
import transformers  # noqa: F401  (first: it looks for the library that is stood in for)
from torch import Tensor

import funcsgmcmc as fs
from decoders import decoder
from funcsgmcmc.decoders import components_of
from funcsgmcmc.estimates.response import influence, susceptibilities
from funcsgmcmc.per_example import losses_on
from funcsgmcmc.runs.restricted import sample_components
from test_response import NBETA, PROBLEM, SAMPLER, START, loss, losses

xarray = pytest.importorskip("xarray")
TOKENS = torch.tensor([1.0, 0.7, -0.4, 2.0])


def of_tokens(params, batch) -> Tensor:
    return losses(params, batch)[:, None] * TOKENS + params["w"].sum() * TOKENS.flip(0)


PROBE = tuple(leaf[:5] for leaf in PROBLEM.data)
OBSERVABLES = {"pile": losses_on(of_tokens, PROBLEM.data), "probe": losses_on(of_tokens, PROBE)}
COMPONENTS = {"full": None, "front": {"w": slice(0, 2)}, "back": {"w": slice(2, 4)}}
SETTINGS = {"num_chains": 3, "num_draws": 25, "num_burnin_steps": 10, "key": fs.key(2)}


@pytest.fixture(scope="module")
def slt():
    """The published functions."""
    stand_in = types.ModuleType("datasets")
    stand_in.Dataset = object
    known = sys.modules.get("datasets")
    sys.modules["datasets"] = known or stand_in
    try:
        from devinterp.slt.bif import compute_bif
        from devinterp.slt.llc import compute_llc
        from devinterp.slt.susceptibilities import compute_susceptibilities
        from devinterp.slt.weight_restrictions import create_param_masks
    finally:
        if known is None:
            del sys.modules["datasets"]
    return types.SimpleNamespace(
        bif=compute_bif,
        llc=compute_llc,
        susceptibilities=compute_susceptibilities,
        masks=create_param_masks,
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, fs.Samples]:
    torch.set_default_dtype(torch.float64)
    return sample_components(
        loss, START, PROBLEM.data, SAMPLER, COMPONENTS, observables=OBSERVABLES, **SETTINGS
    )


def published(samples: fs.Samples) -> "xarray.DataTree":
    """A record in the published layout: losses of tokens, and of every step."""
    variables = {}
    for name, values in samples.observables.items():
        dims = ("chain", "draw", f"batch_{name}", "token_pos")
        variables[f"loss_{name}"] = (dims, values.double().numpy())
        ids = torch.zeros(values.shape[2], values.shape[3] + 1, dtype=torch.int64)
        variables[f"input_ids_{name}"] = ((f"batch_{name}", "token"), ids.numpy())
    # Its minibatches are of sequences, too: as many tokens, with the mean for each.
    steps = samples.losses[:, :, None, None].expand(-1, -1, 1, len(TOKENS))
    dims = ("chain", "step", "batch_sampling", "token_pos")
    variables["sampling_loss_micro"] = (dims, steps.numpy())
    variables["init_loss"] = ((), float(samples.initial_loss))
    config = {"config": {"sampler": {"n_beta": NBETA}}}
    dataset = xarray.Dataset(variables, attrs={"metadata": config})
    return xarray.DataTree(dataset)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("names", [["pile"], ["probe"]])
def test_influence_of_sequences_and_tokens(slt, runs, names, normalized):
    samples, sign = runs["full"], 1 if normalized else -1
    options = {"loss_keys": names, "compute_covariance": not normalized, "device": "cpu"}
    theirs = slt.bif(published(samples), correlation_method="sequence", **options)
    ours = influence(samples, names[0], normalized=normalized).values
    expected = sign * torch.as_tensor(theirs["influences"].values)
    torch.testing.assert_close(ours, expected.double(), rtol=1e-6, atol=1e-9)

    theirs = slt.bif(published(samples), correlation_method="token", batch_size=4, **options)
    expected = sign * torch.as_tensor(theirs["influences"].values).double()
    ours = influence(samples, names[0], normalized=normalized, per="token").values
    torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-6, atol=1e-6)


def test_susceptibilities_of_components(slt, runs):
    trees = {name: published(samples) for name, samples in runs.items()}
    theirs = slt.susceptibilities(trees, "pile", include_sampling_task=True)
    table = theirs["susceptibilities"]["sus"]
    names = theirs["susceptibilities"].attrs["dataset_id_to_name"]
    for name in ("pile", "probe"):
        ours = susceptibilities(runs, name, loss="pile")
        assert list(ours.components) == table["wr"].values.tolist()
        rows = (table["dataset_id"] == names.index(name)).values
        expected = torch.as_tensor(table.values[rows]).T.reshape(ours.values.shape)
        torch.testing.assert_close(ours.values, expected, rtol=1e-6, atol=1e-9)


def test_the_learning_coefficient_where_there_is_no_burnin(slt):
    samples = fs.sample(loss, START, PROBLEM.data, SAMPLER, **(SETTINGS | {"num_burnin_steps": 0}))
    theirs = slt.llc(published(samples))
    assert fs.llc(samples).mean == pytest.approx(float(theirs["llc_mean"]), rel=1e-6)
    torch.testing.assert_close(
        fs.llc(samples).per_chain, torch.as_tensor(theirs["llc_per_chain"].values)
    )


def test_what_it_does_with_burnin(slt, runs):
    """It averages over the steps before the first draw, too, at which chains are on their way."""
    samples = runs["full"]
    theirs = float(slt.llc(published(samples))["llc_mean"])
    every = NBETA * float(samples.losses.mean() - samples.initial_loss)
    assert theirs == pytest.approx(every, rel=1e-9)
    draws = NBETA * float(samples.draw_losses.mean() - samples.initial_loss)
    assert fs.llc(samples).mean == pytest.approx(draws, rel=1e-9)
    assert abs(theirs - draws) > 0.02 * draws


def test_what_it_does_with_a_chain_that_failed(slt, runs):
    """All of its estimates are NaN; here the others are used, and it is said how many."""
    bad = published(runs["full"])
    bad["loss_pile"][1] = math.nan
    theirs = slt.bif(bad, correlation_method="sequence", loss_keys=["pile"], device="cpu")
    assert bool(theirs["influences"].isnull().all())
    lr = torch.tensor([0.02, 1e300, 0.02])
    sampler = fs.sgld(lr, nbeta=NBETA, localization=1.5)
    ours = fs.sample(loss, START, PROBLEM.data, sampler, observables=OBSERVABLES, **SETTINGS)
    found = influence(ours, "pile")
    assert (found.num_chains, found.num_frozen) == (2, 1)
    assert found.values.isfinite().all()


def as_masks(model, component: dict) -> dict[str, Tensor]:
    masks = {}
    for name, leaf in model.named_parameters():
        if name in component:
            masks[name] = torch.zeros(leaf.shape, dtype=torch.bool)
            masks[name][... if component[name] is True else component[name]] = True
    return masks


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama"])
def test_heads_layers_and_modules_are_its_own(slt, name):
    model = decoder(name)
    parts = components_of(model)
    pairs = [("layer0.head1", "l0h1"), ("layer1.head3", "l1h3"), ("layer1", "l1")]
    pairs += [("layer0.attention", "l0 attn"), ("layer1.mlp", "l1 mlp"), ("layer0.group1", "l0g1")]
    for ours, theirs in pairs:
        if ours in parts:
            masks = as_masks(model, parts[ours])
            found = slt.masks(model, theirs)
            assert masks.keys() == found.keys()
            for leaf, mask in found.items():
                assert torch.equal(
                    masks[leaf], torch.ones_like(masks[leaf]) if mask is None else mask
                )


def test_what_it_takes_for_a_head_of_qwen_3(slt):
    """It takes width/heads for the size of a head: half the keys and values that a group has."""
    model = decoder("qwen3")
    masks = as_masks(model, components_of(model)["layer0.head1"])
    found = slt.masks(model, "l0h1")
    for part, share in (("q", 1.0), ("o", 1.0), ("k", 0.5), ("v", 0.5)):
        leaf = f"model.layers.0.self_attn.{part}_proj.weight"
        assert int(found[leaf].sum()) == share * int(masks[leaf].sum())


def test_what_it_calls_the_mean_over_chains(slt):
    """The covariance of chains' averages, which of C independent chains is 1/C of a chain's."""
    samples = fs.sample(
        loss,
        START,
        PROBLEM.data,
        SAMPLER,
        observables=OBSERVABLES,
        **(SETTINGS | {"num_chains": 8, "num_draws": 400}),
    )
    theirs = slt.bif(
        published(samples),
        correlation_method="sequence",
        reduce_chain_dimension_method="mean",
        loss_keys=["pile"],
        compute_covariance=True,
        device="cpu",
    )["influences"].values.diagonal()
    within = -influence(samples, "pile", center="chain").values.diagonal()
    ratio = float((torch.as_tensor(theirs.copy()) / within).mean())
    assert ratio == pytest.approx(1 / 8, rel=0.3)


def test_its_blocks_are_used_by_a_quarter():
    """For each pair of sequences it computes (T + T)² products, and takes T² of them."""
    from devinterp.slt.covariance import batch_cov

    block = batch_cov(torch.randn(2, 4, 9), torch.randn(3, 4, 9))
    assert block.shape == (2, 3, 8, 8)
