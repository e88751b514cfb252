"""Losses of examples and tokens as observables of a run."""

import pickle
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.per_example import losses_on
from problems import classification, run

torch.set_default_dtype(torch.float64)  # as the tests have it
MODEL, DATA = classification()
torch.set_default_dtype(torch.float32)
LOSSES = fs.module_loss(MODEL, partial(cross_entropy, reduction="none"))
MEAN = fs.module_loss(MODEL, cross_entropy)
SAMPLER = fs.sgld(1e-3, nbeta=10.0, localization=1.0)
TEST = tuple(leaf[:7] for leaf in DATA)
OBSERVABLES = {"train": losses_on(LOSSES, DATA, batch_size=9), "test": losses_on(LOSSES, TEST)}


@pytest.mark.parametrize("how", [{}, {"chain_method": "loop"}, {"chunk_size": 2}], ids=str)
def test_they_are_the_losses_at_each_draw(how):
    """Of two data sets, by whatever pieces; and the mean is the loss that was sampled."""
    samples = run(SAMPLER, observables=OBSERVABLES, batch_size=None, **how)
    train = samples.observables["train"]
    assert train.shape == (5, 6, 40)
    assert train.dtype == torch.float32
    torch.testing.assert_close(train.mean(-1), samples.draw_losses.float())
    for chain, draw in ((0, 0), (4, 5)):
        at = samples.draws[chain, draw]
        one_by_one = [MEAN(at, (DATA[0][i : i + 1], DATA[1][i : i + 1])) for i in range(40)]
        torch.testing.assert_close(train[chain, draw], torch.stack(one_by_one).float())
    torch.testing.assert_close(samples.observables["test"], train[..., :7])
    anchor = OBSERVABLES["train"](samples.sampler.anchor)
    assert float(anchor.mean()) == pytest.approx(float(samples.initial_loss), rel=1e-6)


def test_pieces_are_evaluated_one_at_a_time():
    """So that no more than a piece's logits are held."""
    sizes = []

    def spy(params, batch):
        sizes.append(len(batch[1]))
        return LOSSES(params, batch)

    whole = losses_on(LOSSES, DATA)(fs.params_of(MODEL))
    pieces = losses_on(spy, DATA, batch_size=9)(fs.params_of(MODEL))
    assert sizes == [9, 9, 9, 9, 4]
    torch.testing.assert_close(pieces, whole)
    assert not whole.requires_grad


def test_they_are_stored_with_coordinates(tmp_path):
    xarray = pytest.importorskip("xarray")
    samples = run(SAMPLER, observables=OBSERVABLES, store=tmp_path / "run")
    in_memory = run(SAMPLER, observables=OBSERVABLES)
    for name in OBSERVABLES:
        torch.testing.assert_close(samples.observables[name], in_memory.observables[name])
        torch.testing.assert_close(samples.observable(name), in_memory.observable(name))
    with xarray.open_datatree(tmp_path / "run", engine="zarr") as file:
        stored = file["posterior"]["train"]
        assert stored.dtype == "float32"
        assert stored.sel(chain=1, draw=2, train_dim_0=39).shape == ()
        assert stored.coords["train_dim_0"].values.tolist() == list(range(40))


def test_what_the_mask_leaves_out_is_nan():
    def per_token(params, batch):
        return LOSSES(params, batch)[:, None] * torch.ones(3)

    mask = torch.ones(40, 3, dtype=torch.bool)
    mask[2, 1:] = False
    values = losses_on(per_token, DATA, mask=mask, batch_size=7)(fs.params_of(MODEL))
    assert torch.equal(values.isnan(), ~mask)
    examples = losses_on(per_token, DATA, mask=mask[:, 1])(fs.params_of(MODEL))
    assert torch.equal(examples.isnan(), ~mask[:, 1:2].expand(40, 3))
    samples = run(SAMPLER, observables={"tokens": losses_on(per_token, DATA, mask=mask)})
    assert samples.healthy.all()
    assert samples.observables["tokens"].isnan().sum() == 2 * 5 * 6
    worst = fs.summary(samples).table.loc["tokens (worst of 120)"]
    assert worst[["ess_bulk", "ess_tail", "r_hat", "mcse_mean"]].notna().all()


@pytest.mark.parametrize(
    ("loss", "mask", "error", "message"),
    [
        (MEAN, None, ValueError, r"must return one loss for each of 40 examples.*got shape \(\)"),
        (lambda *_: 3.0, None, TypeError, "must return a real tensor, got float"),
        (LOSSES, torch.ones(40), TypeError, "mask must be a bool tensor, got torch.float32"),
        (LOSSES, torch.ones(3, dtype=torch.bool), ValueError, r"mask must have shape \(40,\)"),
        (LOSSES, torch.ones(40, 2, dtype=torch.bool), ValueError, r"the losses' shape \(40,\)"),
        (LOSSES, [True], TypeError, "mask must be a Tensor"),
        (3, None, TypeError, "per_example_loss must be a function"),
    ],
)
def test_what_is_refused(loss, mask, error, message):
    with pytest.raises(error, match=message):
        losses_on(loss, DATA, mask=mask)(fs.params_of(MODEL))


def test_a_piece_has_an_example_at_least():
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        losses_on(LOSSES, DATA, batch_size=0)


def test_they_can_be_pickled():
    again = pickle.loads(pickle.dumps(OBSERVABLES["train"]))
    params = fs.params_of(MODEL)
    torch.testing.assert_close(again(params), OBSERVABLES["train"](params))


@pytest.mark.parametrize("how", [{}, {"chain_method": "loop"}, {"chunk_size": 2}], ids=str)
def test_aux_of_the_loss_is_recorded(how):
    """On the batches of the draws, under its names."""

    def loss(params, batch):
        each = LOSSES(params, batch)
        return each.mean(), {"each": each, "more": (each.max(), params["2.bias"])}

    samples = run(SAMPLER, loss_fn=loss, record=["aux", "draws"], **how)
    seen = samples.observables
    assert list(seen) == ["aux.each", "aux.more.0", "aux.more.1"]
    torch.testing.assert_close(seen["aux.each"].mean(-1), samples.draw_losses)
    torch.testing.assert_close(seen["aux.more.0"], seen["aux.each"].amax(-1))
    assert torch.equal(seen["aux.more.1"], samples.draws["2.bias"])
    one = run(SAMPLER, loss_fn=lambda p, b: (LOSSES(p, b).mean(), LOSSES(p, b)), record=["aux"])
    torch.testing.assert_close(
        one.observables["aux"], run(SAMPLER, loss_fn=loss, record=["aux"]).observables["aux.each"]
    )


def test_aux_must_be_there_to_be_recorded(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs a loss that returns \(loss, aux\), got the loss alone"
    ):
        run(SAMPLER, record=["aux"])
    with pytest.raises(ValueError, match="an observable must not be named 'aux' where record"):
        run(SAMPLER, record=["aux"], observables={"aux": lambda params: params["2.bias"]})

    def loss(params, batch):
        return LOSSES(params, batch).mean(), LOSSES(params, batch)

    stored = run(SAMPLER, loss_fn=loss, record=["aux"], store=tmp_path / "run")
    in_memory = run(SAMPLER, loss_fn=loss, record=["aux"])
    torch.testing.assert_close(stored.observables["aux"], in_memory.observables["aux"])
