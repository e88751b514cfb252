"""Where the published devinterp 2.0.1 differs from its document, `compat` follows the document."""

import io
import math

import devinterp.optim.prior
import pytest
import torch

import compat.prior
from compat import SGLD, SGMCMC, SGNHT
from compat.preconditioner import (
    CompositePreconditioner,
    IdentityPreconditioner,
    MaskPreconditioner,
    PreconditionerCoefs,
)
from compat.prior import CompositePrior, GaussianPrior, Prior
from compat_problems import NOISELESS, QUIET, parameter, quadratic_step

pytestmark = QUIET


@pytest.mark.parametrize("make", [SGLD, SGNHT, SGMCMC, SGMCMC.sgld, SGMCMC.rmsprop_sgld])
def test_nbeta_may_be_a_function(make):
    values = iter([1.5, 2.5, 3.5])
    param, other = parameter(1.0, -2.0), parameter(1.0, -2.0)
    torch.manual_seed(0)
    changing = make([param], nbeta=lambda: next(values))
    torch.manual_seed(0)
    set_by_hand = make([other], nbeta=1.5)
    for step, nbeta in enumerate([1.5, 2.5, 3.5]):
        set_by_hand.param_groups[0]["nbeta"] = nbeta
        torch.manual_seed(step)
        quadratic_step(changing, param)
        torch.manual_seed(step)
        quadratic_step(set_by_hand, other)
        assert torch.equal(param, other)
    refusing = make([parameter(1.0)], nbeta=lambda: -1.0)
    with pytest.raises(ValueError, match="nbeta must be >= 0, got -1"):
        quadratic_step(refusing, *refusing.param_groups[0]["params"])


@pytest.mark.parametrize("make", [SGLD, SGNHT, SGMCMC.sgld])
def test_a_function_is_called_once_a_step_for_all_groups(make):
    params, calls = [parameter(1.0), parameter(1.0)], []

    def nbeta() -> float:
        calls.append(None)
        return float(len(calls))

    optimizer = make([{"params": param} for param in params], nbeta=nbeta)
    calls.clear()
    quadratic_step(optimizer, *params)
    quadratic_step(optimizer, *params)
    assert len(calls) == 2


def test_a_groups_localization_is_its_prior():
    params = [parameter(3.0), parameter(3.0)]
    groups = [{"params": params[0], "localization": 5.0}, {"params": params[1]}]
    optimizer = SGMCMC(groups, lr=0.1, **NOISELESS)
    for param in params:
        param.data += 1
        param.grad = torch.zeros(1)
    optimizer.step()
    assert [param.item() for param in params] == [4.0 - 0.05 * 5.0, 4.0]


def test_a_number_is_a_centre():
    param = parameter(3.0, -1.0)
    optimizer = SGMCMC([param], lr=0.5, prior=GaussianPrior(2.0, center=2.0), noise_level=0.0)
    param.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([3.0 - 0.5, -1.0 + 1.5]))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr must be >= 0, got -0.1"),
        ({"lr": math.nan}, ValueError, "lr must be >= 0, got nan"),
        ({"lr": math.inf}, ValueError, "lr must be finite, got inf"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"nbeta": -1.0}, ValueError, "nbeta must be >= 0, got -1"),
        ({"nbeta": None}, TypeError, "nbeta must be a number or a tensor, got NoneType"),
        ({"lr": None}, TypeError, "lr must be a number or a tensor, got NoneType"),
        ({"lr": lambda: 0.1}, TypeError, "lr must be a number or a tensor, got function"),
        ({"bounding_box_size": -1.0}, ValueError, "bounding_box_size must be >= 0, got -1"),
        ({"bounding_box_size": "big"}, TypeError, "bounding_box_size must be a number"),
    ],
)
@pytest.mark.parametrize("make", [SGLD, SGNHT, SGMCMC, *map(SGMCMC.get_method, ["sgld", "sgnht"])])
def test_bad_hyperparameters_are_refused(make, given, error, message):
    with pytest.raises(error, match=message):
        make([parameter(1.0)], **given)
    with pytest.raises(error, match=message):
        make([{"params": [parameter(1.0)], **given}])


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (SGLD, {"localization": -1.0}, "localization must be >= 0, got -1"),
        (SGLD, {"weight_decay": -1.0}, "weight_decay must be >= 0, got -1"),
        (SGLD, {"noise_level": -1.0}, "noise_level must be >= 0, got -1"),
        (SGLD, {"sketch_dim": 0}, "sketch_dim must be >= 1, got 0"),
        (SGLD, {"sketch_dim": 3, "sketch_seed": -1}, "sketch_seed must be >= 0, got -1"),
        (SGMCMC, {"mask": torch.tensor([math.nan])}, r"mask\[0\] must be real and finite"),
        (
            SGMCMC,
            {"prior": [torch.ones(2)]},
            r"center must have one tensor for each parameter, of shapes \[\(1,\)\], got \[\(2,\)\]",
        ),
        (SGMCMC, {"noise_level": math.nan}, "noise_level must be >= 0, got nan"),
        (SGMCMC, {"prior": -2.0}, "localization must be >= 0, got -2"),
        (SGMCMC, {"prior": "anywhere"}, "center must be one of 'initial', got 'anywhere'"),
        (SGMCMC, {"prior": object()}, "prior must be a Prior, 'initial', a number, tensors"),
        (SGMCMC, {"preconditioner": "adam"}, "preconditioner must be one of 'identity', 'rmsprop'"),
        (SGMCMC, {"preconditioner": 3}, "preconditioner must be a Preconditioner"),
        (
            SGMCMC,
            {"preconditioner": IdentityPreconditioner(), "preconditioner_kwargs": {"eps": 1}},
            "preconditioner_kwargs are for a preconditioner given by name",
        ),
        (SGMCMC.sgld, {"localization": -1.0}, "localization must be >= 0, got -1"),
        (SGMCMC.sgld, {"weight_decay": math.nan}, "weight_decay must be >= 0, got nan"),
        (SGMCMC.rmsprop_sgld, {"alpha": 1.5}, "alpha must be <= 1, got 1.5"),
        (SGMCMC.rmsprop_sgld, {"eps": -0.1}, "eps must be >= 0, got -0.1"),
        (SGMCMC.sgnht, {"diffusion_factor": -0.1}, "diffusion_factor must be >= 0, got -0.1"),
        (SGNHT, {"diffusion_factor": -0.1}, "diffusion_factor must be >= 0, got -0.1"),
        (SGNHT, {"metrics": ["speed"]}, "metrics must be one of 'noise', 'dws'"),
    ],
)
def test_bad_settings_are_refused(make, given, message):
    with pytest.raises(ValueError, match=message):
        make([parameter(1.0)], **given)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (SGMCMC, {"mask": 3}, "mask must be one tensor for each parameter, got int"),
        (SGMCMC, {"noise_level": "loud"}, "noise_level must be a number"),
        (SGMCMC.sgld, {"noise_level": "loud"}, "noise_level must be a number"),
        (SGLD, {"localization": None}, "localization must be a number"),
        (SGNHT, {"diffusion_factor": None}, "diffusion_factor must be a number"),
        (SGLD, {"sketch_dim": 3, "sketch_seed": 1.5}, "sketch_seed must be an integer"),
    ],
)
def test_settings_of_wrong_types_are_refused(make, given, message):
    with pytest.raises(TypeError, match=message):
        make([parameter(1.0)], **given)


@pytest.mark.parametrize("make", [SGLD, SGNHT, SGMCMC.sgld])
def test_a_setting_that_turns_bad_is_refused_at_the_step(make):
    param = parameter(1.0)
    optimizer = make([param], nbeta=2.0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be >= 0, got -1"):
        quadratic_step(optimizer, param)


@pytest.mark.parametrize("make", [SGLD, SGNHT, SGMCMC.sgld, SGMCMC.rmsprop_sgld, SGMCMC.sgnht])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_only_real_parameters_are_sampled(make, dtype):
    with pytest.raises(TypeError, match=r"params\[1\] must be real floating point, got torch"):
        make([torch.ones(2), torch.ones(2, dtype=dtype)])


@pytest.mark.parametrize("make", [SGLD, SGMCMC])
def test_zero_is_a_valid_setting(make):
    param = parameter(1.0, -2.0)
    optimizer = make([param], lr=0.0, nbeta=0.0, noise_level=0.0)
    quadratic_step(optimizer, param)
    assert torch.equal(param, torch.tensor([1.0, -2.0]))


def test_boxes_and_uniform_priors():
    for package in (compat.prior, devinterp.optim.prior):
        with pytest.raises(NotImplementedError, match=r"box_size must be|finite box size not"):
            package.UniformPrior(1.0)
    with pytest.raises(ValueError, match="center must be finite, got nan"):
        GaussianPrior(1.0, center=math.nan)
    with pytest.raises(TypeError, match="center must hold tensors, got int"):
        SGMCMC([parameter(1.0)], prior=GaussianPrior(1.0, center=[1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: SGLD(groups, localization=1.0, save_metrics=True, sketch_dim=3),
        lambda groups: SGMCMC.sgld(groups, localization=1.0, save_metrics=True, sketch_dim=3),
        lambda groups: SGMCMC.rmsprop_sgld(groups, bounding_box_size=0.1, save_metrics=True),
        lambda groups: SGMCMC.sgnht(groups, save_metrics=True, sketch_dim=3),
        lambda groups: SGNHT(groups, bounding_box_size=0.1),
    ],
)
def test_a_group_may_be_added_at_any_time(make):
    """A group added later is a group given at once, at the parameters' values then."""
    runs = []
    for later in (False, True):
        first, second = parameter(1.0, 2.0), parameter(3.0, 4.0, 5.0)
        groups = [{"params": [first]}, {"params": [second], "lr": 0.02}]
        torch.manual_seed(3)
        optimizer = make(groups[:1] if later else groups)
        if later:
            optimizer.add_param_group(groups[1])
        torch.manual_seed(4)
        for _ in range(3):
            quadratic_step(optimizer, first, second)
        runs.append([first, second])
        if getattr(optimizer, "save_metrics", False):
            runs[-1].append(optimizer.get_metrics().noise)
        if getattr(optimizer, "save_sketches", False):
            runs[-1].append(optimizer.get_sketches().noise)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_group_added_after_steps_starts_where_it_is():
    first, second = parameter(1.0), parameter(5.0)
    optimizer = SGMCMC.sgld([first], lr=0.1, localization=3.0, nbeta=2.0, noise_level=0.0)
    quadratic_step(optimizer, first)
    second.data.fill_(7.0)
    optimizer.add_param_group({"params": second})
    second.grad = torch.zeros(1)
    optimizer.step()
    assert second.item() == 7.0


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    param, other = parameter(1.0), parameter(1.0, 2.0)
    optimizer = SGMCMC.sgld([param], nbeta=2.0)
    with pytest.raises(ValueError, match="lr must be >= 0"):
        optimizer.add_param_group({"params": [other], "lr": -1.0})
    with pytest.raises(ValueError, match="mask must have one tensor for each parameter"):
        optimizer.add_param_group({"params": [other], "mask": torch.ones(3)})
    assert len(optimizer.param_groups) == 1
    assert list(optimizer.state) == [param]
    optimizer.add_param_group({"params": [other], "mask": torch.ones(2)})
    quadratic_step(optimizer, param, other)


def test_groups_given_as_dicts_are_the_optimizers():
    param = parameter(1.0)
    group = {"params": [param]}
    optimizer = SGMCMC.sgld([group], nbeta=2.0)
    assert optimizer.param_groups[0] is group
    group["lr"] = 0.0
    quadratic_step(optimizer, param)
    assert param.item() == 1.0


@pytest.mark.parametrize("make", [SGMCMC, SGMCMC.sgld, SGMCMC.rmsprop_sgld])
def test_masks_are_one_a_parameter(make):
    params = [parameter(1.0, 2.0), parameter(1.0, 2.0)]
    for mask in (torch.ones(2), [torch.ones(2)], [torch.ones(2), torch.ones(3)]):
        with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(2,\)\], got \["):
            make(params, mask=mask)
    optimizer = make(params, mask=[torch.tensor([0.0, 1.0]), [True, False]])
    quadratic_step(optimizer, *params)
    assert [param.tolist()[i] for i, param in enumerate(params)] == [1.0, 2.0]
    assert [param.tolist()[1 - i] for i, param in enumerate(params)] != [2.0, 1.0]


@pytest.mark.parametrize("make", [SGLD, SGNHT])
def test_masks_of_the_older_classes(make):
    params = [parameter(1.0, 2.0), parameter(3.0, 4.0)]
    with pytest.raises(ValueError, match="mask must have one tensor for each parameter"):
        make([{"params": params, "mask": torch.ones(3)}])
    optimizer = make([{"params": params, "mask": torch.tensor([0, 1])}], nbeta=2.0)
    quadratic_step(optimizer, *params)
    assert [param.tolist()[0] for param in params] == [1.0, 3.0]
    assert [param.tolist()[1] for param in params] != [2.0, 4.0]


@pytest.mark.parametrize("make", [SGNHT, SGMCMC.sgnht])
def test_sgnht_skips_a_group_without_gradient(make):
    params = [parameter(1.0), parameter(2.0)]
    optimizer = make([{"params": [param]} for param in params], nbeta=2.0)
    thermostat = optimizer.param_groups[1]["thermostat"].clone()
    quadratic_step(optimizer, params[0])
    assert params[1].item() == 2.0
    assert optimizer.param_groups[1]["thermostat"] == thermostat


@pytest.mark.parametrize("make", [SGNHT, SGMCMC.sgnht])
def test_sgnht_uses_a_groups_own_settings(make):
    params = [parameter(*[1.0] * 1000) for _ in range(2)]
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "lr": 0.04, "diffusion_factor": 0.5},
    ]
    torch.manual_seed(0)
    optimizer = make(groups, lr=0.01, nbeta=2.0)
    torch.manual_seed(0)
    drawn = [torch.randn(1000) for _ in range(2)]
    for param, noise, lr in zip(params, drawn, (0.01, 0.04), strict=True):
        torch.testing.assert_close(optimizer.state[param]["momentum"], math.sqrt(lr) * noise)
    assert [group["thermostat"].item() for group in optimizer.param_groups] == [0.01, 0.5]
    torch.manual_seed(1)
    expected = [
        noise * math.sqrt(lr) * (1 - a)
        for noise, lr, a in zip(drawn, (0.01, 0.04), (0.01, 0.5), strict=True)
    ]
    for param in params:
        param.grad = torch.zeros(1000)
    optimizer.step()
    torch.manual_seed(1)
    for param, momentum, lr, a in zip(params, expected, (0.01, 0.04), (0.01, 0.5), strict=True):
        noise = math.sqrt(2 * a * lr) * torch.randn(1000)
        torch.testing.assert_close(param.detach(), 1 + momentum + noise)


@pytest.mark.parametrize("make", [SGNHT, SGMCMC.sgnht, SGMCMC.sgld])
def test_closures_are_evaluated_and_returned(make):
    param = parameter(1.0, 2.0)
    optimizer = make([param], nbeta=2.0)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert param.grad is not None


def drift(prior: Prior, *values: float, then: float = 1.0) -> torch.Tensor:
    """How far one step pulls a parameter that moved by `then` since the optimizer was made."""
    param = parameter(*values)
    optimizer = SGMCMC([param], lr=2.0, prior=prior, **NOISELESS)
    param.data += then
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    return before - param.detach()


def test_composites_of_composites_add_up():
    inner = CompositePrior([GaussianPrior(1.0, center=None), GaussianPrior(10.0)])
    outer = CompositePrior([inner, GaussianPrior(100.0, center=5.0), CompositePrior([inner])])
    expected = 2 * (1.0 * 4.0 + 10.0 * 1.0) + 100.0 * (4.0 - 5.0)
    torch.testing.assert_close(drift(outer, 3.0), torch.tensor([expected]))


def test_one_prior_may_serve_several_composites_and_optimizers():
    prior = GaussianPrior(2.0)
    pulls = [drift(CompositePrior([prior, *others]), 3.0) for others in ([], [prior], [])]
    torch.testing.assert_close(torch.cat(pulls), torch.tensor([2.0, 4.0, 2.0]))
    first, second = parameter(1.0), parameter(8.0)
    optimizers = [
        SGMCMC([param], lr=2.0, prior=CompositePrior([prior]), **NOISELESS)
        for param in (first, second)
    ]
    for optimizer, param in zip(optimizers, (first, second), strict=True):
        param.grad = torch.zeros(1)
        optimizer.step()
    assert (first.item(), second.item()) == (1.0, 8.0)


def test_a_users_prior_keeps_a_state_of_its_own():
    class Counting(Prior):
        key = "calls"

        def initialize(self, params):
            return {param: {self.key: 0} for param in params}

        def grad(self, param, state):
            state[self.key] += 1
            assert "param_idx" in state
            return torch.full_like(param, float(state[self.key]))

    twice = CompositePrior([Counting(), CompositePrior([Counting()])])
    param = parameter(0.0)
    optimizer = SGMCMC([param], lr=2.0, prior=twice, **NOISELESS)
    for _ in range(3):
        param.grad = torch.zeros(1)
        optimizer.step()
    assert param.item() == -2 * (1 + 2 + 3)
    torch.testing.assert_close(twice.grad(param, optimizer.state[param]), torch.tensor([8.0]))


def test_composite_preconditioners_multiply():
    mask = MaskPreconditioner([0.5])
    inner = CompositePreconditioner([IdentityPreconditioner(), mask])
    outer = CompositePreconditioner([inner, CompositePreconditioner([inner]), mask])
    param = parameter(4.0)
    optimizer = SGMCMC([param], lr=1.0, preconditioner=outer, **NOISELESS)
    quadratic_step(optimizer, param)
    assert param.item() == 4.0 - 0.5 * 0.5**3 * 2.0 * 4.0
    assert CompositePreconditioner([]).get_coefficients(param, param, {}) == (1, 1, 1, 1, None)


def test_corrections_add_up():
    combined = PreconditionerCoefs.combine(
        PreconditionerCoefs(2.0, 3.0, 5.0, 7.0, torch.ones(2)),
        PreconditionerCoefs(1.0, 1.0, 1.0, 1.0),
        PreconditionerCoefs(2.0, 2.0, 2.0, 2.0, torch.ones(2)),
    )
    assert combined[:4] == (4.0, 6.0, 10.0, 14.0)
    assert combined.grad_correction.tolist() == [2.0, 2.0]


def test_state_dict_holds_tensors_and_plain_values():
    param = parameter(1.0, 2.0)
    optimizer = SGMCMC.rmsprop_sgld([param], localization=1.0, save_metrics=True, sketch_dim=4)
    quadratic_step(optimizer, param)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["param_groups"][0]["metrics"]["noise"] == optimizer.get_metrics().noise
    assert "preconditioner" not in loaded["param_groups"][0]
