"""Nothing silently wrong: what an attack on the library found, each with its test."""

import itertools
import logging
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import funcsgmcmc as fs
from cases import CASES
from funcsgmcmc.runs import data as data_of_runs
from funcsgmcmc.samplers import Evaluation
from problems import classification, run

PLAIN = fs.sgld(1e-3, nbeta=3.0)
ONES = TensorDict({"w": torch.ones(3)})


# Data


@pytest.mark.parametrize("kind", ["list", "persistent workers"])
def test_a_pass_over_the_data_does_not_disturb_the_run(kind):
    """`svrg` and L(w0) read the data beside the run, which sees its batches in their order."""
    model, (inputs, targets) = classification()
    loss_fn = fs.module_loss(model, cross_entropy)
    loader = DataLoader(
        TensorDataset(inputs, targets),
        8,
        **({"num_workers": 1, "persistent_workers": True} if kind != "list" else {}),
    )
    data = list(loader) if kind == "list" else loader
    seen = []

    def seeing(params, batch):
        seen.append(float(batch[0][0, 0]))
        return loss_fn(params, batch)

    settings = {"batch_size": None, "num_chains": 1, "num_draws": 7, "chain_method": "loop"}
    samples = run(PLAIN, loss_fn=fs.svrg(seeing, 2), data=data, **settings)
    firsts = [float(inputs[i, 0]) for i in range(0, 40, 8)]
    losses = run(
        PLAIN,
        loss_fn=fs.svrg(loss_fn, 2),
        data=list(DataLoader(TensorDataset(inputs, targets), 8)),
        **settings,
    ).losses
    torch.testing.assert_close(samples.losses, losses)
    assert set(seen) == set(firsts)


class Endless:
    """A length, and no end."""

    def __init__(self, batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        while True:
            yield self.batch


class Restarts:
    """One position for all iterations."""

    def __init__(self, batch) -> None:
        self.batches = itertools.repeat(batch)

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        return self.batches


def test_a_pass_ends_with_the_length_of_the_data():
    _, data = classification()
    samples = run(PLAIN, data=Endless(data), batch_size=None)
    assert samples.initial_loss.isfinite()


def test_data_that_cannot_be_read_twice_at_once_is_refused():
    _, data = classification()
    with pytest.raises(
        ValueError, match=r"must be iterable twice at once .* Restarts again starts"
    ):
        run(PLAIN, data=Restarts(data), batch_size=None)


def test_a_long_pass_says_what_it_is_for(monkeypatch, caplog):
    monkeypatch.setattr(data_of_runs, "_SECONDS_OF_A_QUIET_PASS", -1.0)
    caplog.set_level(logging.WARNING, logger="funcsgmcmc")
    _, (inputs, targets) = classification()
    run(PLAIN, data=[(inputs, targets)] * 3, batch_size=None)
    (record,) = caplog.records
    assert "the loss at the anchor: initial_loss=… gives it" in record.getMessage()


def test_micro_batches_cut_examples_alone():
    """Class weights and scalars go to every micro-batch as they are."""
    params = {"w": torch.randn(4, generator=torch.Generator().manual_seed(0))}
    batch = (torch.randn(8, 4), torch.randn(8), torch.rand(4), torch.tensor(2.0))

    def loss_fn(params, batch):
        inputs, targets, weights, scale = batch
        return scale * ((inputs * weights @ params["w"] - targets) ** 2).mean()

    whole = torch.func.grad(loss_fn)(params, batch)["w"]
    for number in (2, 3, 8, 20):
        estimator = fs.accumulated(loss_fn, number)
        found = estimator.evaluate(TensorDict(params), batch, None)
        torch.testing.assert_close(found.grads["w"], whole)
        torch.testing.assert_close(found.loss, loss_fn(params, batch))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(6, 5), torch.ones(6).long()], "a list is an iterable of batches, got tensors"),
        (np.ones((6, 5)), "data must be tensors, got ndarray: torch.as_tensor makes one"),
    ],
)
def test_inputs_and_targets_are_no_list_and_no_arrays(data, message):
    with pytest.raises(TypeError, match=message):
        run(PLAIN, data=data, batch_size=None)


def test_data_that_makes_the_loss_nan_is_refused_at_the_start():
    _, (inputs, targets) = classification()
    inputs[3, 1] = torch.nan
    with pytest.raises(
        ValueError, match="the loss at the anchor, on all data, must be finite, got n"
    ):
        run(PLAIN, data=(inputs, targets))


# Functions of users


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("what", ["loss", "loss on all", "log_prior", "observable"])
def test_functions_that_write_to_what_they_are_given_are_refused(method, what):
    model, (inputs, targets) = classification()
    loss_fn, before = fs.module_loss(model, cross_entropy), inputs.clone()

    def writes_to_batch(params, batch):
        batch[0].mul_(2.0)
        return loss_fn(params, batch)

    def writes(params):
        params["0.bias"].add_(1.0)
        return params["0.bias"].sum()

    settings = {"chain_method": method, "data": (inputs, targets)}
    if what.startswith("loss"):
        settings |= {"loss_fn": writes_to_batch, "batch_size": None if "all" in what else 8}
    else:
        settings |= {"log_prior": writes} if what == "log_prior" else {"observables": {"o": writes}}
    with pytest.raises(
        (ValueError, RuntimeError), match=r"must not write to what it is given|in-pla|inplace"
    ):
        run(PLAIN, **settings)
    assert torch.equal(inputs, before)


def test_an_observable_that_writes_later_does_not_move_the_chain():
    calls = []

    def writes_later(params):
        calls.append(1)
        if len(calls) > 8:
            params["0.bias"].add_(1.0)
        return params["0.bias"].sum()

    with pytest.raises(fs.SamplingError, match="observable 'o' must not write to the parameters"):
        run(PLAIN, observables={"o": writes_later}, chain_method="loop")


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("what", ["the loss", "log_prior", "observable 'o'"])
def test_randomness_of_numpy_is_found(method, what):
    rng = np.random.default_rng(0)
    model, _ = classification()
    loss_fn = fs.module_loss(model, cross_entropy)

    def random_loss(params, batch):
        return loss_fn(params, batch) * float(rng.random())

    def random_number(params):
        return params["0.bias"].sum() * float(rng.random())

    settings = {
        "the loss": {"loss_fn": random_loss},
        "log_prior": {"log_prior": random_number},
        "observable 'o'": {"observables": {"o": random_number}},
    }[what]
    with pytest.raises(ValueError, match=f"{what} must be a function of its arguments alone"):
        run(PLAIN, chain_method=method, **settings)


def test_a_thread_that_draws_from_torchs_generator_does_not_matter():
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(10)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(10):
            run(PLAIN, chain_method="loop", num_chains=1, num_draws=1)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
@pytest.mark.parametrize("how", [{}, {"chain_method": "loop"}, {"compile": True}], ids=str)
def test_a_chain_stops_where_its_prior_is_zero(bad, how):
    """No draw lies where log p is −inf: such a chain is one whose loss is not finite."""

    def log_prior(params):
        inside = params["w"].abs().max() < 0.5
        return torch.where(inside, 0.0, bad) + 0.0 * params["w"].sum()

    samples = fs.sample(
        lambda params, batch: params["w"].square().sum() / 2,
        {"w": torch.zeros(2)},
        torch.zeros(1),
        fs.sgld(0.02, nbeta=1.0),
        num_chains=8,
        num_draws=40,
        key=fs.key(0),
        log_prior=log_prior,
        record=["draws"],
        **how,
    )
    assert not samples.healthy.all()
    for frozen in samples.frozen:
        assert frozen.reason == f"log_prior is {bad}"
    healthy = samples[samples.healthy] if samples.healthy.any() else None
    assert healthy is None or (healthy.draws["w"].abs() < 0.5).all()
    # A frozen chain stays at the last parameters whose prior was known; none of its draws after.
    assert samples.log_priors.shape == samples.losses.shape


# Calls


def test_a_kernel_of_many_chains_settings_is_refused():
    sampler = fs.sgld(torch.tensor([1e-3, 1e-2]), nbeta=1.0)
    with pytest.raises(ValueError, match="a kernel steps one chain, got a sampler of 2 chains"):
        fs.kernel(sampler, lambda params, batch: params["w"].sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fs.kernel(PLAIN, 5), "loss_fn must be a function, got 5"),
        (
            lambda: fs.kernel(PLAIN, PLAIN.update, log_prior=5),
            "log_prior must be a function, got 5",
        ),
        (lambda: fs.compiled(None), "function must be a function, got None"),
        (lambda: run(PLAIN, progress="yes"), "progress must be a bool, got str"),
        (lambda: run(PLAIN, record="draws"), "record must be a list of draws, draw_moments, obs"),
        (lambda: run(PLAIN, on_draw=3), "on_draw must be a function, got 3"),
        (lambda: run(PLAIN, max_distance="far"), "max_distance must be a number, got str"),
        (
            lambda: run(PLAIN, loss_fn=classification()[0]),
            r"got the module Sequential: module_loss\(",
        ),
        (
            lambda: fs.diagnostics(torch.ones(2, 9) + 1j),
            "values must be a real tensor, got torch.comp",
        ),
        (lambda: fs.llc(torch.ones(3)), "samples must be a Samples, got Tensor"),
        (lambda: fs.summary({}), "samples must be a Samples, got dict"),
        (lambda: fs.to_datatree(None), "samples must be a Samples, got NoneType"),
        (lambda: fs.plots.plot_llc([]), "samples must be a Samples, got list"),
        (lambda: fs.default_nbeta(torch.ones(9)), "integer, got Tensor: it is len"),
        (lambda: fs.sgld([0.1, 0.2], nbeta=1.0), "got list, of which torch.tensor makes one"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_chains_beyond_the_keys_are_refused():
    with pytest.raises(ValueError, match=r"chain_offset \+ num_chains must be <= 2\*\*62"):
        run(PLAIN, chain_offset=2**62)


def test_noise_and_gradients_of_other_shapes_are_refused():
    params = TensorDict({"w": torch.ones(3, 2)})
    state = PLAIN.init(params)
    narrow = TensorDict({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"noise\['w'\] has shape \(2,\), parameter has \(3, 2\)"):
        PLAIN.update(state, Evaluation(params), narrow)
    with pytest.raises(ValueError, match=r"the gradient\['w'\] is missing, parameter has \(3, 2\)"):
        PLAIN.update(state, Evaluation(TensorDict({"v": torch.ones(2)})), params)


def test_errors_of_the_first_try_say_what_was_tried():
    _, (inputs, targets) = classification()
    with pytest.raises(RuntimeError) as caught:
        run(PLAIN, data=(inputs.float(), targets))
    note, hint = caught.value.__notes__
    assert "when the loss was tried, before the run, with" in note
    assert "float32[1, 8, 5]" in note
    assert "inputs have the parameters' dtype (inputs.float())" in hint

    def not_mapped(params, batch):
        return params["0.bias"].sum() * (2.0 if params["0.bias"].sum() > 0 else 1.0)

    with pytest.raises(RuntimeError) as caught:
        run(PLAIN, loss_fn=not_mapped)
    assert "chain_method='loop'" in caught.value.__notes__[0]


@pytest.mark.parametrize("batch_size", [8, None])
def test_a_summed_loss_is_noticed(batch_size):
    model, _ = classification()
    summed = fs.module_loss(model, torch.nn.CrossEntropyLoss(reduction="sum"))
    with pytest.warns(UserWarning, match="twice as large on a batch that is repeated: .* the mean"):
        run(PLAIN, loss_fn=summed, batch_size=batch_size)


# Records


@pytest.mark.parametrize("case", CASES, ids=str)
def test_records_and_their_errors_pickle(case, params):
    samples = run(case.make(params), num_chains=2)
    for kind in (fs.SamplingError, fs.DivergenceError):
        error = pickle.loads(pickle.dumps(kind("stopped", samples)))
        assert type(error) is kind
        assert str(error) == "stopped"
        torch.testing.assert_close(error.samples.losses, samples.losses)
        torch.testing.assert_close(error.samples.state.params, samples.state.params)


def fails_in_a_process(seed: int) -> None:
    torch.set_default_dtype(torch.float64)
    _, (inputs, targets) = classification()
    run(PLAIN, data=iter([(inputs, targets)] * 3), batch_size=None, key=fs.key(seed))


def test_a_pool_gets_the_error_and_its_record():
    with (
        multiprocessing.get_context("spawn").Pool(1) as pool,
        pytest.raises(fs.SamplingError) as caught,
    ):
        pool.apply(fails_in_a_process, (0,))
    assert caught.value.samples.num_steps == 3


def test_estimators_of_the_gradient_pickle():
    model, data = classification()
    loss_fn = fs.module_loss(model, cross_entropy)
    params = fs.params_of(model)
    for estimator in (
        fs.accumulated(loss_fn, 2),
        fs.control_variates(loss_fn),
        fs.svrg(loss_fn, 2),
    ):
        again = pickle.loads(pickle.dumps(estimator))
        torch.testing.assert_close(again(params, data), estimator(params, data))


# Compilation


@pytest.mark.slow
def test_more_networks_compile_than_torch_has_room_for(monkeypatch):
    """Torch stops at 256 compilations of one function, and then runs it in eager code or fails."""
    compile_now = torch.compile

    def quickly(function, **options):
        return compile_now(function, backend="eager", **{**options, "options": None})

    def doubled(x):
        return 2 * x

    monkeypatch.setattr(torch, "compile", quickly)
    for width in range(1, 301):
        assert fs.compiled(doubled)(torch.ones(width)).sum() == 2 * width


# Errors from below


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fs.tree.normal_like(fs.key(0), 3),
            TypeError,
            "like must be a TensorDictBase, got",
        ),
        (lambda: fs.norms.metrics(3), TypeError, "terms must be a Terms, got int"),
        (lambda: run(PLAIN, num_draws=10**30), ValueError, r"num_draws must be <= 2\*\*62, got 1"),
        (lambda: fs.sgld(torch.tensor([]), nbeta=1.0), ValueError, r"lr must be a number or have"),
        (
            lambda: fs.schedules.constant(torch.tensor([])),
            ValueError,
            r"value must be a number or have shape \[chains\], got shape \(0,\)",
        ),
        (
            lambda: run(PLAIN, observables={"o": lambda params: params["0.bias"][:0]}),
            ValueError,
            r"observable 'o' must return at least one value, got shape \(0,\)",
        ),
        (
            lambda: run(PLAIN, observables={"o": lambda params: params["0.bias"] + 1j}),
            TypeError,
            "observable 'o' must return a real tensor, got torch.complex128",
        ),
        (
            lambda: run(PLAIN, {"w": torch.ones(3, device="meta")}),
            ValueError,
            r"params\['w'\] must have values and gradients, is of the meta device",
        ),
        (
            lambda: run(PLAIN, {"w": torch.ones(3).to(torch.float8_e4m3fn)}),
            TypeError,
            r"params\['w'\] must be dense, of 16 bits at least, got torch.float8_e4m3fn",
        ),
        (
            lambda: run(PLAIN, {"w": torch.eye(3).to_sparse()}),
            TypeError,
            r"params\['w'\] must be dense, .* torch.sparse_coo",
        ),
        (
            lambda: run(PLAIN, data=torch.eye(3).to_sparse()),
            TypeError,
            "data must hold dense tensors, got torch.sparse_coo on cpu",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": {"w": torch.ones(3)}}, TypeError, "SGLD steps a LangevinState, .* got dict"),
        ({"key": 7}, TypeError, r"key must be made by funcsgmcmc.key\(seed\), got int"),
        ({"key": torch.ones(2)}, ValueError, "key must be int32 of shape"),
        (
            {"state": fs.baoa(0.1, nbeta=1.0, friction=1.0).init(ONES, ONES)},
            TypeError,
            "SGLD steps a LangevinState, made by its init, got MomentumState",
        ),
    ],
)
def test_a_kernel_names_what_it_cannot_step(change, error, message):
    step = fs.kernel(PLAIN, lambda params, batch: params["w"].sum())
    given = {"state": PLAIN.init({"w": torch.ones(3)}), "batch": None, "key": fs.key(0)} | change
    with pytest.raises(error, match=message):
        step(given["state"], given["batch"], given["key"])


def test_inference_mode_is_named():
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"got torch.inference_mode: leave"),
    ):
        run(PLAIN)
    with torch.inference_mode():
        params = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="must have values and gradients, is of inference mode"):
        run(PLAIN, params)
