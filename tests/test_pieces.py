"""Updates in pieces: the same steps, bit for bit, as of the whole tree."""

import pytest
import torch
from tensordict import TensorDict
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from cases import BY_NAME, CASES, Case
from funcsgmcmc import pieces, tree
from problems import run

WHOLE = {"contour_sgld", "badoda"}  # the energy, and a thermostat amid the step, couple all entries


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of every kind for trees of a few entries: rows, whole leaves, vectors."""
    monkeypatch.setattr(pieces, "_LARGE_TREE", 0)
    monkeypatch.setattr(pieces, "_PIECE", 16)
    monkeypatch.setattr(pieces, "_SMALL_LEAF", 5)


@pytest.fixture
def wide_params() -> TensorDict:
    """Small leaves in a row, some of which no batch dimension precedes, and a large one."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (2,), "b": (), "c": (3,), "d": (7, 3), "e": (4, 2), "f": (0,), "g": (1,)}
    return TensorDict({name: torch.randn(s, generator=generator) for name, s in shapes.items()})


def quadratic(params, batch):
    rows = torch.cat([leaf.reshape(-1) for leaf in params.values()])
    return ((rows - batch.mean()) ** 2).mean() + rows.cos().mean()


def everything_of(samples: fs.Samples) -> list[torch.Tensor]:
    return [samples.losses, samples.frozen_at, *pytree.tree_leaves(samples.state)]


def assert_same(ours: fs.Samples, theirs: fs.Samples) -> None:
    assert tree.names(ours.state.params) == tree.names(theirs.state.params)
    for one, other in zip(everything_of(ours), everything_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("chain_method", ["vmap", "loop"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_in_pieces_is_the_run(case: Case, chain_method, wide_params, request):
    def sample():
        return fs.sample(
            quadratic,
            wide_params,
            torch.linspace(-1, 1, 20),
            case.make(wide_params),
            num_chains=3,
            num_draws=6,
            batch_size=5,
            init_noise=0.01,
            key=fs.key(2),
            chain_method=chain_method,
        )

    whole = sample()
    request.getfixturevalue("small_pieces")
    sampler = case.make(wide_params)
    made = pieces.pieces_of(sampler, wide_params)
    if any(name in case.name for name in WHOLE):
        assert not made
    else:
        kinds = {(piece.is_flat, piece.rows is not None) for piece in made}
        assert kinds == {(True, False), (False, True), (False, False)}
    assert_same(sample(), whole)


@pytest.mark.parametrize("name", ["rmsprop_sgld", "sgnht", "sgld with everything"])
def test_a_vmapped_kernel_works_in_pieces(name, wide_params, request):
    sampler = BY_NAME[name].make(wide_params)
    step = fs.kernel(sampler.with_anchor(wide_params), quadratic)
    chains = wide_params.expand(4).clone()
    keys = fs.random.split(fs.key(5), 4)
    noise = tree.normal_like(fs.random.split(fs.key(6), 4), chains)
    batches = torch.linspace(-1, 1, 12).reshape(4, 3)

    def steps():
        state = torch.vmap(sampler.init)(chains, noise)
        for _ in range(3):
            state, _ = torch.vmap(step)(state, batches, keys)
        return pytree.tree_leaves(state)

    whole = steps()
    request.getfixturevalue("small_pieces")
    for one, other in zip(steps(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.usefixtures("small_pieces")
def test_masks_may_be_partial_in_pieces(wide_params):
    mask = {"a": True, "d": 0.5, "e": torch.ones(4, 2), "g": False}
    samples = fs.sample(
        quadratic,
        wide_params,
        torch.ones(4),
        fs.sgnht(1e-3, nbeta=1.0, mask=mask),
        num_chains=2,
        num_draws=3,
        key=fs.key(0),
    )
    moved = {
        name: bool((leaf != wide_params[name]).any()) for name, leaf in samples.state.params.items()
    }
    assert moved == {"a": True, "b": True, "c": True, "d": True, "e": True, "f": False, "g": False}


@pytest.mark.usefixtures("small_pieces")
def test_a_gradient_that_an_estimator_keeps_is_not_used_up(wide_params):
    """The tree that `evaluate` gives may be the estimator's own."""

    class Kept(fs.gradients.GradientEstimator):
        grads = wide_params.clone()

        def evaluate(self, params, batch, memory):
            return fs.samplers.Evaluation(self.grads, self.loss_fn(params, batch))

    fs.sample(
        Kept(quadratic),
        wide_params,
        torch.ones(4),
        fs.sgld(1e-3, nbeta=1.0),
        num_chains=1,
        num_draws=3,
        key=fs.key(0),
        chain_method="loop",
    )
    assert tree.names(Kept.grads) == tree.names(wide_params)


@pytest.mark.usefixtures("small_pieces")
def test_gradients_of_other_shapes_are_refused_in_pieces(wide_params):
    sampler = fs.sgld(1e-3, nbeta=1.0)
    state = sampler.init(wide_params)
    grads = wide_params.clone()
    grads["d"] = grads["d"][:1]
    with pytest.raises(ValueError, match=r"the gradient\['d'\] has shape \(1, 3\)"):
        pieces.update_in_pieces(
            sampler,
            state,
            fs.samplers.Evaluation(grads),
            pieces.pieces_of(sampler, wide_params),
            [torch.zeros(tree.size(wide_params))],
        )


def test_small_trees_are_updated_as_a_whole(params):
    assert pieces.pieces_of(fs.sgld(1e-3, nbeta=1.0), params) == []


class TestLargeAnchors:
    """A large tree is lent to a run, and not copied."""

    @pytest.fixture(autouse=True)
    def _large(self, monkeypatch):
        monkeypatch.setattr("funcsgmcmc.runs.start._LARGE", 0)

    def test_the_record_has_its_own(self, params):
        samples = run(fs.sgld(1e-3, nbeta=1.0, localization=1.0), params, num_draws=2)
        anchor = samples.sampler.anchor
        for name, leaf in tree.leaves(params):
            assert torch.equal(anchor[name], leaf)
            assert anchor[name].untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()

    def test_it_must_not_change_meanwhile(self, params):
        given = params.clone()

        def careless(state):
            with torch.no_grad():
                given[tree.names(given)[0]].add_(1.0)
            return state[tree.names(given)[0]].sum()

        with pytest.raises(fs.SamplingError, match="must not be written to while its chains run"):
            run(
                fs.sgld(1e-3, nbeta=1.0),
                given,
                num_draws=2,
                observables={"careless": careless},
                chain_method="loop",
            )
