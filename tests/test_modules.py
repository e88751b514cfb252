"""Which parameters of a module are sampled, and which batches its loss takes."""

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import funcsgmcmc as fs
from problems import classification, run


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def test_params_of_copies_and_lists_tied_weights_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    params = fs.params_of(model)
    assert set(params.keys()) == {"0.weight", "1.weight", "1.bias", "2.bias"}
    assert not any(leaf.requires_grad for leaf in params.values())
    before = params["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(params["0.weight"], before)


def test_frozen_parameters_are_not_sampled_unless_asked_for():
    model = network()
    model[0].requires_grad_(False)
    assert set(fs.params_of(model).keys()) == {"2.weight", "2.bias"}
    assert len(fs.params_of(model, include_frozen=True).keys()) == 4
    # The loss takes the frozen ones from the module.
    loss_fn, (inputs, targets) = fs.module_loss(model, cross_entropy), classification()[1]
    loss = loss_fn(fs.params_of(model), (inputs, targets))
    torch.testing.assert_close(loss, cross_entropy(model(inputs), targets))


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("2.*", {"2.weight", "2.bias"}),
        ("*.bias", {"0.bias", "2.bias"}),
        (["0.bias", "2.w*"], {"0.bias", "2.weight"}),
        (lambda name, leaf: leaf.ndim == 2, {"0.weight", "2.weight"}),
    ],
)
def test_a_part_of_a_network_is_selected_by_name(only, expected):
    assert set(fs.params_of(network(), only).keys()) == expected


def test_a_run_restricted_to_a_part_moves_that_part_alone():
    model, data = classification()
    params = fs.params_of(model, "2.*")
    samples = run(
        fs.sgld(1e-3, nbeta=3.0), loss_fn=fs.module_loss(model, cross_entropy), params=params
    )
    assert set(samples.draws.keys()) == {"2.weight", "2.bias"}
    # The same as a run of the whole network that starts at the part's anchor: L(w0) is the model's.
    whole = fs.module_loss(model, cross_entropy)(fs.params_of(model), data)
    torch.testing.assert_close(samples.initial_loss, whole.detach())


def test_any_name_of_a_tied_weight_selects_it():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert set(fs.params_of(model, "1.weight").keys()) == {"0.weight"}


@pytest.mark.parametrize(
    ("only", "error", "message"),
    [
        ("1.*", ValueError, r"only='1.\*' must match a parameter, got none of 0.weight, 0.bias,"),
        (["2.*", "x"], ValueError, "only='x' must match a parameter"),
        ("2", ValueError, r"got none of 0.weight, .*; '2.\*' takes all of '2'"),
        ([], ValueError, "only must hold at least one pattern, got none"),
        (lambda name, leaf: False, ValueError, "only must take a parameter, got none of 2.weight"),
        (["2.*", "0.*"], ValueError, r"only='0.\*' must match a parameter to sample, got frozen"),
        (nn.ReLU(), TypeError, "only must be patterns of names or a function, got ReLU"),
        (3, TypeError, "only must be patterns of names or a function, got int"),
        ([3], TypeError, "a pattern of only must be a str, got int"),
    ],
)
def test_selections_of_nothing_are_refused(only, error, message):
    model = network()
    model[0].requires_grad_(False)
    with pytest.raises(error, match=message):
        fs.params_of(model, only)


def test_modules_without_parameters_to_copy_are_refused():
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match=r"got frozen ones .* include_frozen=True takes: 0.weight"):
        fs.params_of(frozen)
    with pytest.raises(ValueError, match="module must have parameters, got ReLU"):
        fs.params_of(nn.ReLU())
    with pytest.raises(TypeError, match="module must be a Module, got dict"):
        fs.params_of({})
    model = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="parameter 'weight' of LazyLinear must have a shape"):
        fs.params_of(model)


def test_many_names_are_cut_short():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    with pytest.raises(ValueError, match=r"5.bias and 28 more"):
        fs.params_of(model, "x")


class Embedder(nn.Module):
    """A model in the manner of Hugging Face: keyword arguments, an output with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.embed(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        logits = self.head(hidden)
        loss = None if labels is None else cross_entropy(logits.flatten(0, -2), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, (10, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids > 1).long(), "labels": ids.roll(1, -1)}


def language_criterion(output, batch):
    return cross_entropy(output.logits.flatten(0, -2), batch["labels"].flatten())


@pytest.mark.parametrize("kind", [dict, UserDict, lambda d: TensorDict(d, batch_size=10)])
def test_entries_of_a_dict_are_keyword_arguments(kind):
    torch.manual_seed(0)
    model, batch = Embedder(), tokens()
    params = fs.params_of(model)
    expected = model(**batch).loss
    own = fs.module_loss(model)(params, kind(batch))
    torch.testing.assert_close(own, expected)
    # With a criterion, entries that `forward` does not name are the criterion's.
    with_more = batch | {"weight": torch.ones(10)}
    del with_more["labels"]
    more = kind(with_more | {"targets": batch["labels"]})

    def criterion(output, batch):
        return cross_entropy(output.logits.flatten(0, -2), batch["targets"].flatten())

    torch.testing.assert_close(fs.module_loss(model, criterion)(params, more), expected)
    # Inputs of a pair may be a dict, too.
    inputs = kind({name: batch[name] for name in ("input_ids", "attention_mask")})

    def of_pair(output, targets):
        return cross_entropy(output.logits.flatten(0, -2), targets.flatten())

    pair = fs.module_loss(model, of_pair)(params, (inputs, batch["labels"]))
    torch.testing.assert_close(pair, expected)


def test_dicts_are_sampled_in_minibatches():
    torch.manual_seed(0)
    model, batch = Embedder(), tokens()
    for data, size in ((batch, 4), (UserDict(batch), 4), ([batch, batch], None)):
        samples = fs.sample(
            fs.module_loss(model),
            fs.params_of(model),
            data,
            fs.sgld(1e-3, nbeta=5.0),
            num_chains=2,
            num_draws=3,
            batch_size=size,
            key=fs.key(0),
        )
        assert samples.losses.isfinite().all()
        torch.testing.assert_close(samples.initial_loss, model(**batch).loss.detach())


def test_single_tensors_are_their_own_targets():
    model, inputs = nn.Linear(3, 3), torch.ones(4, 3)
    expected = mse_loss(model(inputs), inputs)
    for batch in (inputs, (inputs,), [inputs]):
        loss = fs.module_loss(model, mse_loss)(fs.params_of(model), batch)
        torch.testing.assert_close(loss, expected)


def test_a_model_may_return_its_loss():
    class OwnLoss(nn.Linear):
        def forward(self, inputs, targets):
            return mse_loss(super().forward(inputs), targets)

    model, data = OwnLoss(3, 2), (torch.ones(4, 3), torch.ones(4, 2))
    loss = fs.module_loss(model)(fs.params_of(model), data)
    torch.testing.assert_close(loss, model(*data))

    class InADict(OwnLoss):
        def forward(self, inputs, targets):
            return {"loss": super().forward(inputs, targets)}

    model = InADict(3, 2)
    torch.testing.assert_close(
        fs.module_loss(model)(fs.params_of(model), data), model(*data)["loss"]
    )


@pytest.mark.parametrize(
    ("criterion", "batch", "error", "message"),
    [
        (language_criterion, "text", TypeError, r"a batch must be .*, got str: for others, write"),
        (language_criterion, (1, 2, 3), TypeError, r"must be \(inputs, targets\), got 3 parts"),
        (None, (1, 2, 3, 4), TypeError, "Embedder.forward .* takes 3 of 4: give one, module_loss"),
        (
            None,
            {"ids": torch.zeros(2, 3)},
            TypeError,
            "Embedder.forward needs 'input_ids', got ids",
        ),
        (
            None,
            tokens() | {"label": torch.zeros(10)},
            TypeError,
            "Embedder.forward has no 'label', only attention_mask, input_ids, labels",
        ),
        (
            None,
            {"input_ids": tokens()["input_ids"]},
            TypeError,
            r"Embedder must return its loss, .* got SimpleNamespace with loss None .* has labels",
        ),
        (
            cross_entropy,
            ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "mask": torch.ones(2)}, 0),
            TypeError,
            "Embedder.forward has no 'mask'",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused_by_name(criterion, batch, error, message):
    model = Embedder()
    with pytest.raises(error, match=message):
        fs.module_loss(model, criterion)(fs.params_of(model), batch)


def test_names_that_the_model_lacks_are_refused():
    model, data = classification()
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    params["2.bais"] = params["2.bias"]
    with pytest.raises(
        ValueError, match=r"params has '2.bais', which is no parameter of the model"
    ):
        loss_fn(params, data)
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    both = {"0.weight": torch.ones(3, 3), "1.weight": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight', which are one tied weight"):
        fs.module_loss(tied, mse_loss)(TensorDict(both), torch.ones(2, 3))


def test_shapes_that_are_not_the_models_are_refused():
    model, data = classification()
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    stacked = {name: torch.stack([leaf, leaf]) for name, leaf in params.items()}
    with pytest.raises(ValueError, match=r"has shape \(2, 6, 5\), the .* \(6, 5\) \(many chains"):
        run(fs.sgld(1e-3, nbeta=1.0), loss_fn=loss_fn, params=stacked)
    params["2.bias"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"params\['2.bias'\] has shape \(1,\), the model's param"):
        loss_fn(params, data)
    with pytest.raises(TypeError, match=r"got list|torch.stack one for many chains"):
        run(fs.sgld(1e-3, nbeta=1.0), loss_fn=loss_fn, params=[params, params])


def test_a_state_dict_with_buffers_is_refused_with_advice():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).eval()
    data = classification()[1]
    loss_fn = fs.module_loss(model, cross_entropy)
    with pytest.raises(TypeError, match=r"got torch.int64: buffers, .*params_of\(module\) takes"):
        run(fs.sgld(1e-3, nbeta=1.0), loss_fn=loss_fn, params=model.state_dict())
    floating = {n: leaf for n, leaf in model.state_dict().items() if leaf.is_floating_point()}
    with pytest.raises(ValueError, match=r"'1.running_mean', which is no parameter of the model"):
        loss_fn(TensorDict(floating), data)


def test_bad_arguments_of_a_module_loss_are_refused():
    model = network()
    with pytest.raises(TypeError, match="model must be a Module, got int"):
        fs.module_loss(3, cross_entropy)
    with pytest.raises(TypeError, match="criterion must be a function, got 3"):
        fs.module_loss(model, 3)
    with pytest.raises(TypeError, match=r"got the class CrossEntropyLoss: call it first"):
        fs.module_loss(model, nn.CrossEntropyLoss)
    with pytest.raises(TypeError, match=r"dtype must be a real floating dtype, got torch.int64"):
        fs.module_loss(model, cross_entropy, dtype=torch.int64)


@pytest.mark.parametrize("only", [None, "2.*"])
def test_a_loss_may_be_evaluated_in_another_dtype(only):
    """The model in bfloat16; parameters, gradients and the criterion in theirs."""
    model, (inputs, targets) = classification()
    model.append(nn.BatchNorm1d(3).eval())
    seen = {}

    def criterion(output, targets):
        seen["output"] = output.dtype
        return cross_entropy(output, targets)

    model[0].register_forward_hook(lambda layer, args, output: seen.update(layer=output.dtype))
    params = fs.params_of(model, only)
    loss_fn = fs.module_loss(model, criterion, dtype=torch.bfloat16)
    grads, loss = torch.func.grad_and_value(loss_fn)(params, (inputs, targets))
    wide = params["2.weight"].dtype
    assert (seen["layer"], seen["output"], loss.dtype) == (torch.bfloat16, wide, wide)
    assert grads["2.weight"].dtype == wide
    exact = cross_entropy(model(inputs), targets)
    assert 0 < abs(loss - exact) < 0.02 * exact
