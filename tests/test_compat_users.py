"""Priors and preconditioners of a user's own, in the ways that people write them."""

import pytest
import torch
from torch import nn

from compat import SGLD, SGMCMC
from compat.preconditioner import CompositePreconditioner, RMSpropPreconditioner
from compat.prior import CompositePrior, GaussianPrior, Prior

pytestmark = [
    pytest.mark.filterwarnings("ignore:nbeta is 1"),
    pytest.mark.filterwarnings("ignore:SGLD is deprecated"),
]

START = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def pulled(prior, *, then: float = 1.0, **settings) -> torch.Tensor:
    """How far a step with lr = 2 and no gradient goes, after the parameter moved by `then`."""
    param = nn.Parameter(START.clone())
    optimizer = SGMCMC([param], lr=2.0, prior=prior, noise_level=0.0, nbeta=2.0, **settings)
    param.data += then
    before = param.detach().clone()
    param.grad = torch.zeros(3)
    optimizer.step()
    return before - param.detach()


class Constant(Prior):
    """A prior that pulls as a function of the parameter says."""

    key = "constant"

    def __init__(self, pull):
        self.pull = pull

    def initialize(self, params):
        return {}

    def grad(self, param, state):
        return self.pull(param)


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("save_metrics", [False, True])
@pytest.mark.parametrize(
    ("pull", "expected"),
    [
        (lambda w: 2.0, 0 * START + 2),
        (lambda w: torch.tensor(2.0), 0 * START + 2),
        (lambda w: w, START + 1),
        (lambda w: w[-1:].expand(3), 0 * START + 4),
        (lambda w: w.flip(0), START.flip(0) + 1),
    ],
    ids=["number", "scalar", "parameter itself", "view of it", "copy"],
)
def test_whatever_a_pull_is_made_of(pull, expected, save_metrics, composite):
    prior = Constant(pull)
    if composite:
        prior = CompositePrior([prior])
    torch.testing.assert_close(pulled(prior, save_metrics=save_metrics), expected)


def test_pulls_may_share_memory():
    scratch = torch.empty(3)
    priors = [Constant(lambda w, k=factor: torch.mul(w, k, out=scratch)) for factor in (1.0, 10.0)]
    torch.testing.assert_close(pulled(CompositePrior(priors)), 11.0 * (START + 1))


def test_parameters_may_lie_in_one_buffer():
    flat = torch.arange(6.0)
    params = [nn.Parameter(flat[:3]), nn.Parameter(flat[3:])]
    neighbour = Constant(lambda w: flat[1:4].clone() if w.data_ptr() == flat.data_ptr() else 0.0)
    optimizer = SGMCMC(params, lr=2.0, prior=neighbour, noise_level=0.0, nbeta=1.0)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(flat, torch.tensor([-2.0, -2.0, -2.0, 2.0, 3.0, 4.0]))


def test_an_overridden_pull_is_used():
    class Half(CompositePrior):
        def grad(self, param, state):
            return 0.5 * super().grad(param, state)

    class Double(GaussianPrior):
        def grad(self, param, state):
            return 2 * super().grad(param, state)

    ones = torch.ones(3)
    torch.testing.assert_close(pulled(Half([GaussianPrior(4.0)])), 2 * ones)
    torch.testing.assert_close(pulled(Double(4.0)), 8 * ones)
    torch.testing.assert_close(pulled(CompositePrior([Double(4.0)])), 8 * ones)
    replaced = GaussianPrior(4.0)
    replaced.grad = lambda param, state: torch.full_like(param, 7.0)
    torch.testing.assert_close(pulled(replaced), 7 * ones)


def test_a_change_of_precision_takes_effect():
    prior = GaussianPrior(1.0)
    param = nn.Parameter(START.clone())
    optimizer = SGMCMC([param], lr=2.0, prior=CompositePrior([prior]), noise_level=0.0)
    param.data += 1
    prior.localization = 0.25
    param.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), START + 0.75)


def test_a_gaussian_of_ones_own_in_a_composite_sees_the_whole_state():
    class Anchored(GaussianPrior):
        def grad(self, param, state):
            assert state["param_idx"] == 0
            return self.localization * (param - state["initial_param"])

    both = CompositePrior([GaussianPrior(1.0), Anchored(2.0)])
    torch.testing.assert_close(pulled(both, bounding_box_size=9.0), torch.full((3,), 3.0))


def test_what_a_prior_remembers_is_found_under_its_name():
    class Remembering(Prior):
        key = "anchor_mean"

        def initialize(self, params):
            return {param: {self.key: param.mean().detach()} for param in params}

        def grad(self, param, state):
            return state[self.key] * torch.ones_like(param)

    param = nn.Parameter(START.clone())
    optimizer = SGMCMC([param], prior=CompositePrior([Remembering(), GaussianPrior(1.0)]))
    assert optimizer.state[param]["anchor_mean"] == 2.0
    torch.testing.assert_close(pulled(CompositePrior([Remembering()] * 2)), torch.full((3,), 4.0))


def test_a_composite_without_a_state_pulls_to_zero():
    prior = CompositePrior([GaussianPrior(4.0, center=None)])
    torch.testing.assert_close(prior.grad(START, {}), 4 * START)


def test_distance_is_from_the_initial_parameters():
    """Not from the centre of a prior, whatever that is."""

    class Elsewhere(GaussianPrior):
        def initialize(self, params):
            return {param: {self.key: param.detach() + 10.0} for param in params}

    for prior in (Elsewhere(1.0), GaussianPrior(1.0, center=5.0), GaussianPrior(1.0, center=None)):
        param = nn.Parameter(START.clone())
        optimizer = SGMCMC([param], prior=prior, save_metrics=True)
        param.data += 2.0
        param.grad = torch.zeros(3)
        optimizer.step()
        assert optimizer.get_metrics().distance.item() == pytest.approx(2 * 3**0.5)
    recentred = nn.Parameter(START.clone())
    optimizer = SGMCMC([recentred], prior="initial", save_metrics=True)
    optimizer.state[recentred]["prior_center"] = START + 10.0
    recentred.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.get_metrics().distance.item() == 0


def test_a_preconditioner_without_the_base_init():
    class Fixed(RMSpropPreconditioner):
        def __init__(self):
            self.eps = 0.5

    param = nn.Parameter(START.clone())
    optimizer = SGMCMC([param], lr=1.0, preconditioner=Fixed(), noise_level=0.0, nbeta=2.0)
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), START - 1 / (0.1 + 0.5))


def test_named_settings_serve_the_groups_without_a_preconditioner_of_their_own():
    params = [nn.Parameter(START.clone()) for _ in range(2)]
    own = RMSpropPreconditioner(0.5, 0.2)
    optimizer = SGMCMC(
        [{"params": params[0], "preconditioner": own}, {"params": params[1]}],
        preconditioner="rmsprop",
        preconditioner_kwargs={"alpha": 0.9},
    )
    groups = optimizer.param_groups
    assert groups[0]["preconditioner"] is own
    assert groups[1]["preconditioner"].alpha == 0.9
    assert repr(CompositePreconditioner([own])) == f"CompositePreconditioner({own})"


def test_a_mask_may_be_changed_during_a_run():
    params = [nn.Parameter(START.clone()), nn.Parameter(START.clone())]
    optimizer = SGLD([{"params": params, "mask": torch.ones(3)}], lr=0.1)
    optimizer.param_groups[0]["mask"][1] = 0.0
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert [param[1].item() for param in params] == [2.0, 2.0]
    optimizer.param_groups[0]["mask"] = torch.zeros(3)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_a_prior_that_fails_leaves_no_trace():
    class Failing(Prior):
        key = "failing"

        def initialize(self, params):
            return dict.fromkeys(params, 3)

        def grad(self, param, state):
            return param

    param, other = nn.Parameter(START.clone()), nn.Parameter(START.clone())
    optimizer = SGMCMC([param])
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [other], "prior": Failing()})
    assert list(optimizer.state) == [param]
    optimizer.add_param_group({"params": [other]})
