"""Terms are what an update is made of: they add up, and metrics are of them."""

import torch
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.metrics import metrics
from funcsgmcmc.terms import MaybeTerm, Term, Terms
from funcsgmcmc.testing.laws.law import close, identical, law, may_be, parameter_like, unless
from funcsgmcmc.testing.problems import Problem


@law(bounding_box_size=None)
def terms_add_up(problem: Problem) -> None:
    """The terms of a step are what it adds to the parameters."""
    for before, after, terms in problem.path():
        move = [tree.flatten(term.value()) for term in terms.up() + momentum_of(terms)]
        fall = [tree.flatten(term.value()) for term in terms.down()]
        moved = tree.flatten(after.params) - tree.flatten(before.params)
        close(sum(move) - sum(fall), moved, "sum of the terms, against w' − w")


def momentum_of(terms: Terms) -> list[Term]:
    """The term of the momentum, if there is one."""
    return [terms.momentum] if terms.momentum else []


@law(bounding_box_size=None)
def terms_are_what_they_are_called(problem: Problem) -> None:
    """A term is zero where what it is named after is, and the unscaled gradient has no factors."""
    settings = problem.settings.keys()
    quiet = problem.with_evaluation(
        *(given.evaluation._replace(prior_pull=None) for given in problem.given)
    )
    absent = [
        (quiet, "localization", ("localization",)),
        (problem, "weight_decay", ("weight_decay",)),
        (problem, "nbeta", ("scaled_grad", "unscaled_grad")),
        (problem, "temperature", ("noise", "correction") if problem.spec.linear_in_noise else ()),
    ]
    for given, setting, names in absent:
        if setting in settings and problem.spec.allows(setting, 0.0):
            for _, _, terms in given.changed(**{setting: 0.0}).path():
                for name in names:
                    value = flat(getattr(terms, name))
                    close(value, torch.zeros_like(value), f"{name} at {setting} 0")
    ((_, _, terms), *_), grads = problem.path(), tree.flatten(problem.given[0].evaluation.grads)
    unscaled = flat(terms.unscaled_grad)
    size, along = (grads * grads).sum(-1, keepdim=True), (grads * unscaled).sum(-1, keepdim=True)
    close(unscaled * size, grads * along, "unscaled_grad, times what makes it a multiple of g")
    nothing = {"mask": None, "preconditioner": None}
    if not problem.spec.adaptive and may_be(**nothing)(problem.spec) is None:
        bare = problem.changed(**nothing).path()[0].terms
        close(
            flat(bare.unscaled_grad),
            flat(bare.scaled_grad),
            "unscaled_grad, against scaled_grad, where only SamplerSpec(adaptive=True) scales it",
        )


def flat(term: MaybeTerm) -> Tensor:
    """A term in a row; a zero, if there is none."""
    return tree.flatten(term.value()) if term else torch.zeros(())


@law()
def metrics_are_norms(problem: Problem) -> None:
    """Metrics are norms and inner products of the terms, and count what the mask leaves."""
    for before, _, terms in problem.path():
        measured = metrics(terms, problem.sampler.mask)
        zero = torch.zeros_like(tree.flatten(before.params))
        values = {name: flat(term) + zero for name, term in terms._asdict().items()}
        if terms.distance:
            center = tree.flatten(problem.sampler.center(before))
            close(values["distance"], tree.flatten(before.params) - center, "distance")
        prior = values["localization"] + values["weight_decay"]
        expected = {name: values[name].norm(dim=-1) for name in measured._fields[:6]}
        expected["dot_grad_prior"] = (values["scaled_grad"] * prior).sum(-1)
        expected["dot_grad_noise"] = (values["scaled_grad"] * values["noise"]).sum(-1)
        expected["dot_prior_noise"] = (prior * values["noise"]).sum(-1)
        for name, value in expected.items():
            got = torch.as_tensor(getattr(measured, name), dtype=value.dtype)
            close(got.expand_as(value), value, f"metric {name}")
        mask = problem.settings.get("mask")
        seen = mask if mask is not None else tree.map_leaves(torch.ones_like, before.params)
        count = torch.count_nonzero(tree.flatten(seen), dim=-1)
        identical(measured.numel, count.expand(problem.chains), "metric numel")


@law(
    exempt=unless("linear_in_noise", "it is not linear in the noise"),
    max_steps=1,
    bounding_box_size=None,
)
def linearity_in_noise(problem: Problem) -> None:
    """The noise enters w' and p' linearly: f(η + 2ζ) − f(0) = f(η) − f(0) + 2 (f(ζ) − f(0))."""
    first, second = tree.flatten(problem.given[0].noise), tree.flatten(problem.start)

    def moved(flat: Tensor) -> list[Tensor]:
        noise = tree.unflatten(flat, problem.start)
        moving = parameter_like(problem.with_noise(noise).final())
        return [tree.flatten(moving[name]) for name in ("params", "momentum") if name in moving]

    rest, one, two = moved(0 * first), moved(first), moved(second)
    for got, at_rest, a, b in zip(moved(first + 2 * second), rest, one, two, strict=True):
        close(got, a + 2 * (b - at_rest), "response to η + 2ζ")
