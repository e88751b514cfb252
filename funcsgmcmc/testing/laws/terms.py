"""Laws of terms: they add up to the step, each has its meaning, and metrics measure them."""

from dataclasses import replace

import torch
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.norms import metrics
from funcsgmcmc.terms import Term
from funcsgmcmc.testing.laws.base import (
    close,
    comparable_fields,
    identical,
    law,
    unless,
    unless_allowed,
)
from funcsgmcmc.testing.problem import Problem, field_values


@law(bounding_box_size=None)
def terms_add_up(problem: Problem) -> None:
    """The terms of a step add up to w' − w."""
    for before, after, terms in problem.path():
        up = [_flat(term) for term in (terms.momentum, terms.correction, terms.noise)]
        down = [_flat(term) for term in (terms.scaled_grad, terms.localization, terms.weight_decay)]
        moved = tree.flatten(after.params) - tree.flatten(before.params)
        close(sum(up) - sum(down), moved, "sum of the terms, against w' − w")
        close(tree.flatten(terms.total()), moved, "terms.total(), against w' − w")


@law(bounding_box_size=None)
def terms_are_what_they_are_called(problem: Problem) -> None:
    """A term is 0 where its setting is, and `unscaled_grad` is a multiple of the gradient."""
    quiet = problem.with_evaluation(
        *(replace(given.evaluation, prior_pull=None) for given in problem.given)
    )
    zero_with = [
        (quiet, "localization", ("localization",)),  # which holds a log-prior's pull too
        (problem, "weight_decay", ("weight_decay",)),
        (problem, "nbeta", ("scaled_grad", "unscaled_grad")),
        (problem, "temperature", ("noise", "correction") if problem.spec.linear_in_noise else ()),
    ]
    for each, setting, names in zero_with:
        if setting in problem.settings and problem.spec.allows(setting, 0.0):
            for _, _, terms in each.with_settings(**{setting: 0.0}).path():
                for name in names:
                    value = _flat(getattr(terms, name))
                    close(value, torch.zeros_like(value), f"{name} at {setting} 0")
    grads = tree.flatten(problem.given[0].evaluation.grads)
    unscaled = _flat(problem.path()[0].terms.unscaled_grad)
    size, along = (grads * grads).sum(-1, keepdim=True), (grads * unscaled).sum(-1, keepdim=True)
    # Without a division: ‖g‖² u = ⟨g, u⟩ g holds for a gradient of zeros too.
    close(unscaled * size, grads * along, "unscaled_grad, times what makes it a multiple of g")
    nothing = {"mask": None, "preconditioner": None}
    if not problem.spec.adaptive and unless_allowed(**nothing)(problem.spec) is None:
        bare = problem.with_settings(**nothing).path()[0].terms
        close(
            _flat(bare.unscaled_grad),
            _flat(bare.scaled_grad),
            "unscaled_grad, against scaled_grad, where only SamplerSpec(adaptive=True) scales it",
        )


def _flat(term: Term | None) -> Tensor:
    """A term as a vector; the number 0, if the step has no such term."""
    return torch.zeros(()) if term is None else tree.flatten(term.value())


@law()
def metrics_are_norms(problem: Problem) -> None:
    """Metrics are norms and inner products of the terms, and the number of unmasked entries."""
    for before, _, terms in problem.path():
        measured = metrics(terms, problem.sampler.mask)
        zero = torch.zeros_like(tree.flatten(before.params))
        values = {name: _flat(term) + zero for name, term in field_values(terms)}
        if terms.distance is not None:
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
        if mask is None:
            mask = tree.map_leaves(torch.ones_like, before.params)
        count = torch.count_nonzero(tree.flatten(mask), dim=-1)
        identical(measured.numel, count.expand(problem.chains), "metric numel")


@law(
    exempt=unless("linear_in_noise", "it is not linear in the noise"),
    max_steps=1,
    bounding_box_size=None,
)
def linearity_in_noise(problem: Problem) -> None:
    """The noise enters w' and p' linearly: f(η + 2ζ) − f(0) = f(η) − f(0) + 2 (f(ζ) − f(0))."""
    first, second = tree.flatten(problem.given[0].noise), tree.flatten(problem.start)

    def respond(flat: Tensor) -> list[Tensor]:
        noise = tree.unflatten(flat, problem.start)
        fields = comparable_fields(problem.with_noise(noise).final())
        return [tree.flatten(fields[name]) for name in ("params", "momentum") if name in fields]

    rest, one, two = respond(0 * first), respond(first), respond(second)
    for got, at_rest, a, b in zip(respond(first + 2 * second), rest, one, two, strict=True):
        close(got, a + 2 * (b - at_rest), "response to η + 2ζ")
