"""What cannot be sampled is refused where it enters, with the rule and the value."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc import random, tree
from problems import classification, good_loss


class Net(nn.Module):
    """A network with a layer in the middle."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, 6), layer, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.first(x)))


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(6)])
def test_impure_layers_are_refused_with_advice(layer):
    model, data = Net(layer()), classification()[1]
    with pytest.raises(
        ValueError, match=r"layer 'layer' \(\w+\) is in train mode: call model.eval"
    ):
        fs.module_loss(model, cross_entropy)
    loss_fn = fs.module_loss(model.eval(), cross_entropy)
    params = fs.params_of(model)
    settings = {"num_chains": 2, "num_draws": 2, "key": fs.key(0)}
    fs.sample(loss_fn, params, data, fs.sgld(1e-3, nbeta=1.0), **settings)
    model.train()
    with pytest.raises(ValueError, match=r"in train mode: call model.eval"):
        fs.sample(loss_fn, params, data, fs.sgld(1e-3, nbeta=1.0), **settings)


def test_a_loop_refuses_a_random_model_that_does_not_vmap():
    model = nn.Sequential(nn.Linear(5, 3), nn.RReLU())
    with pytest.raises(ValueError, match="it draws random numbers or updates buffers"):
        fs.sample(
            fs.module_loss(model, cross_entropy),
            fs.params_of(model),
            classification()[1],
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=2,
            num_draws=2,
            key=fs.key(0),
            chain_method="loop",
        )


def test_a_loop_takes_a_pure_loss_that_writes_into_its_own_tensor():
    def loss_fn(params, batch):
        out = torch.zeros(3)
        out[0] = params["w"].sum()
        return out.sum()

    samples = fs.sample(
        loss_fn,
        {"w": torch.ones(3)},
        torch.ones(4),
        fs.sgld(1e-3, nbeta=1.0),
        num_chains=2,
        num_draws=2,
        key=fs.key(0),
        chain_method="loop",
    )
    assert samples.num_steps == 2


@pytest.mark.parametrize("chain_method", ["vmap", "loop", "auto"])
@pytest.mark.parametrize("kind", ["random", "buffer"])
def test_impure_losses_are_refused_with_advice(kind, chain_method):
    count = torch.zeros(3)

    def loss_fn(params, batch):
        if kind == "random":
            return (params["w"] * torch.rand(3)).sum()
        count.add_(params["w"])
        return (params["w"] * count).sum()

    with pytest.raises(ValueError, match="it draws random numbers or updates buffers"):
        fs.sample(
            loss_fn,
            {"w": torch.ones(3)},
            torch.ones(4),
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=2,
            num_draws=2,
            key=fs.key(0),
            chain_method=chain_method,
        )
    assert torch.equal(count, torch.zeros(3))


def test_a_loop_takes_a_model_that_does_not_vmap():
    def loss_fn(params, batch):
        scale = 2.0 if params["w"].sum().item() > 0 else 1.0
        return scale * (params["w"] ** 2).sum()

    settings = {"num_chains": 2, "num_draws": 3, "key": fs.key(0)}
    arguments = (loss_fn, {"w": torch.ones(3)}, torch.ones(4), fs.sgld(1e-3, nbeta=1.0))
    samples = fs.sample(*arguments, **settings, chain_method="loop")
    assert samples.losses.shape == (2, 3)
    with pytest.raises(RuntimeError, match="vmap"):
        fs.sample(*arguments, **settings)


BAD_CALLS = [
    (
        {"loss_fn": lambda p, b: p["w"]},
        ValueError,
        r"loss_fn must return a scalar, got shape \(3,\)",
    ),
    ({"loss_fn": lambda p, b: 1.0}, TypeError, "real floating tensor, got float"),
    ({"params": {"w": torch.ones(3).long()}}, TypeError, r"params\['w'\] must be real floating"),
    (
        {"params": {"w": torch.tensor([1, torch.nan, 1])}},
        ValueError,
        r"params\['w'\] must be finite",
    ),
    ({"params": {}}, ValueError, "params must hold at least one parameter"),
    ({"params": nn.Linear(2, 2)}, TypeError, "params must be a TensorDict or a mapping"),
    (
        {"params": TensorDict({"w": torch.ones(3, 3)}, batch_size=3)},
        ValueError,
        r"params must have batch size \(\) or \(2,\).*got \(3,\)",
    ),
    ({"data": torch.ones(0, 3)}, ValueError, "data must hold at least one example"),
    ({"data": []}, ValueError, "data must give at least one batch, got none"),
    ({"data": (torch.ones(3), torch.ones(4))}, ValueError, r"got lengths \[3, 4\]"),
    ({"data": ()}, ValueError, "data must hold at least one example, got none"),
    ({"data": (torch.ones(3), "x")}, TypeError, "data must hold tensors only, got str"),
    ({"data": (torch.ones(3).numpy(),)}, TypeError, "got ndarray, of which torch.from_numpy makes"),
    ({"data": torch.tensor(1.0)}, ValueError, "got a 0-d tensor"),
    ({"data": 3}, TypeError, "data must be tensors or an iterable of batches, got int"),
    ({"data": [torch.ones(2)], "batch_size": 2}, ValueError, "batch_size must be None for an it"),
    ({"batch_size": 5}, ValueError, "at most the number of examples 4, got 5"),
    ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
    ({"shared_batches": "epochs"}, TypeError, "shared_batches must be a bool"),
    ({"minibatches": "random"}, ValueError, "minibatches must be one of 'replacement', 'epochs'"),
    ({"num_chains": 0}, ValueError, "num_chains must be >= 1, got 0"),
    ({"num_draws": 2.5}, TypeError, "num_draws must be an integer, got 2.5"),
    ({"num_burnin_steps": -1}, ValueError, "num_burnin_steps must be >= 0, got -1"),
    ({"num_steps_between_draws": 0}, ValueError, "num_steps_between_draws must be >= 1, got 0"),
    ({"chain_offset": -1}, ValueError, "chain_offset must be >= 0"),
    ({"record": ["losses"]}, ValueError, r"record\[…\] must be one of 'draws', .*, got 'losses'"),
    ({"max_loss": torch.nan}, ValueError, "max_loss must be finite, got nan"),
    ({"chunk_size": "all"}, ValueError, "chunk_size must be one of 'auto', got 'all'"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
    ({"init_noise": -1.0}, ValueError, "init_noise must be >= 0, got -1"),
    ({"key": 3}, TypeError, r"key must be made by funcsgmcmc.key\(seed\), got int"),
    (
        {"key": fs.random.split(fs.key(0), 2)},
        ValueError,
        r"one key, of shape \(2,\), got shape \(2, 2\)",
    ),
    (
        {"chain_method": "pmap"},
        ValueError,
        "chain_method must be one of 'vmap', 'loop', 'auto', got 'pmap'",
    ),
    (
        {"loss_fn": lambda p, b: b.sum()},
        ValueError,
        "loss_fn must depend on the params it is given",
    ),
    ({"loss_fn": lambda p, b: p["w"].sum().detach()}, ValueError, "must depend on the params"),
    ({"loss_fn": None}, TypeError, "loss_fn must be a function, got None"),
    ({"loss_fn": lambda p, b: (p["w"].sum(), 1, 2)}, TypeError, "got 3 values"),
    (
        {"loss_fn": lambda p, b: (p["w"].sum(), "x")},
        TypeError,
        "aux must hold tensors only, got str",
    ),
    ({"sampler": fs.sgld}, TypeError, "sampler must be one made by a factory.*got 'sgld': call it"),
    ({"sampler": (torch.ones(99),)}, TypeError, r"sgld\(lr=..., nbeta=...\), got tuple"),
    ({"log_prior": 3}, TypeError, "log_prior must be a function, got 3"),
    ({"observables": [1]}, TypeError, "observables must map names to functions"),
    ({"observables": {"a": 3}}, TypeError, r"observables\['a'\] must be a function, got 3"),
    ({"observables": {"draw": tree.norm}}, ValueError, "must not be named 'draw'"),
    (
        {"observables": {"a": lambda p: torch.tensor(p["w"].sum().item())}, "num_burnin_steps": 9},
        RuntimeError,
        "vmap",
    ),
    ({"initial_loss": torch.zeros(7)}, ValueError, r"shape \(\) or \(2,\), got shape \(7,\)"),
    ({"initial_loss": torch.nan}, ValueError, "initial_loss must be finite, got nan"),
    ({"initial_loss": torch.empty((), device="meta")}, TypeError, "initial_loss must be real"),
    ({"initial_loss": "a"}, TypeError, "initial_loss must be a number or a tensor, got str"),
    ({"init_noise": torch.ones(2)}, ValueError, r"init_noise must be a number, got shape \(2,\)"),
    ({"data": "hello"}, TypeError, "data must be tensors or an iterable of batches, got str"),
    ({"data": [torch.ones(2)], "minibatches": "epochs"}, ValueError, "minibatches must not be set"),
    (
        {"data": TensorDict({"x": torch.ones(3)})},
        ValueError,
        "a TensorDict of data must have a batch",
    ),
    ({"chain_method": "loop", "chunk_size": -3}, ValueError, "chunk_size must be >= 1, got -3"),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, anchor={"w": torch.ones(3, dtype=torch.float16)})},
        ValueError,
        r"anchor\['w'\] has dtype torch.float16, parameter has torch.float64",
    ),
    (
        {"compile": "all"},
        ValueError,
        "compile must be one of True, False, 'noise', 'auto', got 'all'",
    ),
    ({"on_divergence": "ignore"}, ValueError, "on_divergence must be one of 'freeze', 'raise'"),
    (
        {"sampler": fs.sgld(torch.ones(3), nbeta=1.0)},
        ValueError,
        r"sampler must have batch size \(\) or \(2,\)",
    ),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, mask={"v": torch.ones(3)})},
        ValueError,
        "mask has unknown key 'v'",
    ),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, anchor={"w": torch.ones(4)})},
        ValueError,
        r"anchor\['w'\] has shape \(4,\), parameter has \(3,\)",
    ),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, anchor={"w": torch.zeros(3)}, bounding_box_size=0.5)},
        ValueError,
        r"must start within bounding_box_size of the anchor, got an entry 0\.5 outside",
    ),
    ({"observables": {"loss": tree.norm}}, ValueError, "an observable must not be named 'loss'"),
    (
        {"observables": {"w": tree.norm}, "record": ["draws"]},
        ValueError,
        "observable must not be named 'w'",
    ),
    ({"log_prior": lambda p: p["w"]}, ValueError, "log_prior must return a scalar"),
    (
        {"observables": {"x": lambda p: 3}},
        TypeError,
        "observable 'x' must return a real tensor, got int",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS)
def test_bad_calls_are_refused_before_anything_runs(changed, error, message):
    call = {
        "loss_fn": good_loss,
        "params": {"w": torch.ones(3)},
        "data": torch.ones(4),
        "sampler": fs.sgld(0.1, nbeta=1.0),
        "num_chains": 2,
        "num_draws": 2,
        "key": fs.key(0),
    }
    with pytest.raises(error, match=message):
        fs.sample(**(call | changed))


def test_data_sets_are_sent_to_a_loader():
    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.ones(2)

    with pytest.raises(
        TypeError, match=r"data set Examples: wrap it in a torch\.utils\.data\.DataLoader"
    ):
        fs.sample(
            good_loss,
            {"w": torch.ones(3)},
            Examples(),
            fs.sgld(0.1, nbeta=1.0),
            num_chains=1,
            num_draws=1,
            key=fs.key(0),
        )


def test_init_noise_has_its_standard_deviation():
    samples = fs.sample(
        good_loss,
        {"w": torch.ones(5)},
        torch.ones(4),
        fs.sgld(0.1, nbeta=1.0),
        num_chains=4000,
        num_draws=1,
        key=fs.key(0),
        init_noise=0.2,
        record=["draws"],
    )
    score = (samples.draws["w"] - 1) / 0.2
    assert abs(score.mean()) * 20000**0.5 < 4
    assert abs(score.square().mean() - 1) * (20000 / 2) ** 0.5 < 4
    noise = random.normal(random.fold_in(random.split(fs.key(0), 2)[1], torch.arange(4000)), (5,))
    torch.testing.assert_close(score[:, 0], noise)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (torch.ones(4, 3), torch.zeros(4)),
        (torch.ones(4, 3, dtype=torch.float64), torch.zeros(4).long()),
    ],
)
def test_dtypes_that_do_not_fit_are_explained(inputs, targets):
    model = torch.nn.Linear(3, 2, dtype=torch.float32)
    with pytest.raises(RuntimeError) as caught:
        fs.sample(
            fs.module_loss(model, torch.nn.functional.cross_entropy),
            fs.params_of(model),
            (inputs, targets),
            fs.sgld(0.1, nbeta=1.0),
            num_chains=2,
            num_draws=2,
            key=fs.key(0),
        )
    assert "inputs have the parameters' dtype" in caught.value.__notes__[-1]
