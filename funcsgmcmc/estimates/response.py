"""Responses of a posterior: how losses of examples move together, and with a network's parts.

With ℓ_i the loss of example (or token) i, recorded at each draw by `losses_on`, L the loss on the
data that is sampled from, φ = L − L(w*), and means over draws of healthy chains:

    influence             BIF(i, ψ) = −Cov(ℓ_i, ψ), or the correlation Corr(ℓ_i, ψ)
    susceptibility        χ_i(C) = E_C(φ L) − E_C(φ ℓ_i) − E_C(φ) (E L − E ℓ_i)
    functional variance   Σ_i Var ℓ_i
    share of the LLC      (nβ/T) (E ℓ_i − ℓ_i(w*))/n

Each comes with its Monte Carlo error, by batches of draws (`batch_means`). Frozen chains are left
out, and the result says how many. Matrices are computed block by block.

Shapes: C chains, D draws, n examples, T tokens; losses are `[C, D, n]` or `[C, D, n, T]`, NaN where
there is no token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.batch_means import BatchMeans, batches_of, means_over_draws
from funcsgmcmc.estimates.covariance import (
    BLOCK,
    Center,
    at_least_two,
    covariances,
    covariances_of_moments,
)
from funcsgmcmc.runs.attributes import check_one_law, settings_of_draws
from funcsgmcmc.runs.record import Samples

Per = Literal["example", "token"]


@dataclass(frozen=True, eq=False)
class Response:
    """An estimate of many quantities at once, each with its Monte Carlo error.

    Attributes:
        values: The estimate, `[…]`, float64; NaN where a token has no loss.
        mcse: Its Monte Carlo standard error, `[…]`, autocorrelation included.
        num_chains: How many chains the estimate uses.
        num_frozen: How many chains are frozen, and left out.
        components: Names of the first dimension, of susceptibilities; else none.
    """

    values: Tensor
    mcse: Tensor
    num_chains: int
    num_frozen: int
    components: tuple[str, ...] = ()

    def __str__(self) -> str:
        chains = f"{self.num_chains} chains"
        if self.num_frozen:
            chains += f", {self.num_frozen} frozen and left out"
        if not self.values.ndim:
            return f"{float(self.values):.4g} ± {float(self.mcse):.2g} ({chains})"
        clear = int((self.values.abs() > 2 * self.mcse).sum())
        shape = " × ".join(map(str, self.values.shape))
        number = int((~self.values.isnan()).sum())
        return f"{shape} values, {clear} of {number} beyond two standard errors of 0 ({chains})"


def influence(
    samples: Samples,
    of: str,
    on: str | Tensor | None = None,
    *,
    normalized: bool = False,
    per: Per = "example",
    center: Center = "pooled",
    block_size: int = BLOCK,
) -> Response:
    """Estimate the influence of each example on an observable: the Bayesian influence function.

        BIF(i, ψ) = −Cov(ℓ_i, ψ)

    the first-order change of E ψ when example i gets more weight in the loss: with n L + ε ℓ_i in
    place of n L it is β ε BIF(i, ψ), for the inverse temperature β = nβ/n. Normalized, it is the
    correlation of the two, +Corr(ℓ_i, ψ), which is also called the loss kernel.

    Source: Kreer et al., "Bayesian influence functions for Hessian-free data attribution", 2025
    (arXiv:2509.26544), for the covariance under the localized posterior.

    Args:
        samples: A run; or one of which only the moments of observables were recorded
            (`record=["observable_moments"]`): then errors are those between chains.
        of: Name of the observable that holds the losses ℓ.
        on: Name of the observable ψ, or its values `[C, D, …]`. Default: ℓ itself. Then the matrix
            is symmetric, and each pair is computed once.
        normalized: Whether to give correlations in place of −Cov.
        per: Whether an example is one unit, with the mean of its tokens' losses, or each token is
            its own: `"example"` averages ℓ and ψ over the dimensions after their first.
        center: Whether covariances are taken around the mean of all chains, or around each chain's
            own and then averaged: chains that have not mixed differ in their means.
        block_size: Entries of ℓ and ψ in a block.

    Returns:
        `[…, …]`, the shape of ℓ's entries and that of ψ's: `[n, n]`, or `[n, T, n, T]` by tokens.

    Raises:
        TypeError, ValueError: An argument is none of the above; no draw was made, no chain is
            healthy, chains have different settings, the draws have weights or are of several
            temperatures, or one draw alone was recorded.
    """
    _check(samples)
    checks.choice("per", per, ("example", "token"))
    checks.choice("center", center, ("pooled", "chain"))
    checks.switch("normalized", normalized)
    checks.count("block_size", block_size, minimum=1)
    sign = 1.0 if normalized else -1.0
    if _has_moments_only(samples, of, on):
        assert samples.observable_moments is not None
        values, mcse = covariances_of_moments(
            samples.observable_moments[samples.healthy],
            of,
            of if on is None else str(on),
            normalized=normalized,
            over_tokens=per == "example",
            center=center,
        )
        return _response(samples, sign * values, mcse)
    rows = _trace(samples, "of", of, per)
    columns = None if on is None else _trace(samples, "on", on, per)
    shapes = rows.shape[2:], (rows if columns is None else columns).shape[2:]
    values, mcse = covariances(rows, columns, normalized, center, block_size)
    return _response(samples, sign * values.reshape(*shapes[0], *shapes[1]), mcse)


def functional_variance(samples: Samples, of: str, *, per: Per = "token") -> Response:
    """Estimate the functional variance Σ_i Var ℓ_i, the sum over examples, or over tokens.

    Where ℓ are negative log-likelihoods and β = nβ/n, the correction of the widely applicable
    information criterion is β/n times it, and the singular fluctuation β/2 times its mean.

    Source: Watanabe, "Asymptotic equivalence of Bayes cross validation and widely applicable
    information criterion", JMLR 11 (2010).

    Args:
        samples: A run.
        of: Name of the observable that holds the losses ℓ.
        per: As for `influence`.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: As `influence`.
    """
    _check(samples)
    checks.choice("per", per, ("example", "token"))
    trace = _trace(samples, "of", of, per)
    trace = trace.reshape(*trace.shape[:2], -1)
    number = at_least_two(trace)
    center = trace.mean((0, 1), dtype=torch.float64)
    # A token without loss adds nothing.
    total = means_over_draws(trace, lambda values: (values - center).square().nansum(-1).mean())
    scale = number / (number - 1)
    return _response(samples, scale * total.mean, scale * total.mcse)


def llc_shares(
    samples: Samples, of: str, initial_losses: Tensor, *, per: Per = "example"
) -> Response:
    """Estimate what each example adds to the learning coefficient.

        λ̂_i = (nβ/T) (E ℓ_i − ℓ_i(w*))/n

    Their sum is λ̂, where ℓ are the losses of all training data and L is their mean.

    Args:
        samples: A run, of the whole network or of a component.
        of: Name of the observable that holds the losses ℓ.
        initial_losses: ℓ(w*), as `losses(samples.sampler.anchor)` gives it, with the observable's
            function: `[n]` or `[n, T]`.
        per: Whether the shares are those of examples, sums over their tokens, or of tokens.

    Returns:
        `[n]` or `[n, T]`. Of tokens, n is the number of those that have a loss.

    Raises:
        TypeError, ValueError: As `influence`, or the losses at w* have another shape.
    """
    _check(samples, one_law=False)
    checks.choice("per", per, ("example", "token"))
    trace = _trace(samples, "of", of, "token")
    checks.instance("initial_losses", initial_losses, Tensor)
    if initial_losses.shape != trace.shape[2:] or initial_losses.is_complex():
        raise ValueError(
            f"initial_losses must be real, of shape {tuple(trace.shape[2:])}, got "
            f"{initial_losses.dtype} of shape {tuple(initial_losses.shape)}"
        )
    nbeta, temperature = settings_of_draws(samples)
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be > 0 at the draws, got {float(temperature.min()):g}")
    start = initial_losses.detach().cpu().double()
    number = int((~trace[0, 0].isnan()).sum())
    scale = (nbeta / temperature)[samples.healthy].double() / number
    is_summed = per == "example" and start.ndim > 1
    rises = BatchMeans()
    for chain in range(len(trace)):
        for batch in batches_of(*trace.shape[:2]):
            rise = trace[chain, batch].double() - start
            rise = rise.nansum(tuple(range(2, rise.ndim))) if is_summed else rise
            factor = scale[chain, batch].reshape(-1, *(1,) * (rise.ndim - 1))
            rises.add((factor * rise).mean(0), len(rise))
        rises.end_chain()
    return _response(samples, rises.mean, rises.mcse)


def susceptibilities(
    runs: Mapping[str, Samples],
    of: str,
    *,
    loss: str | None = None,
    full: str = "full",
    initial_loss: float | None = None,
    per: Per = "token",
) -> Response:
    """Estimate the susceptibilities of components of a network to examples.

        χ_i(C) = E_C(φ L) − E_C(φ ℓ_i) − E_C(φ) (E L − E ℓ_i),   φ = L − L(w*)

    with E_C over the chains of component C, and E over those of the whole network: minus the
    covariance of φ, on the component, with ℓ_i − L, whose mean is taken over the full posterior. It
    is negative where the component's being away from w* goes with a loss of example i that is
    larger than that of the others.

    Source: Baker, Wang, Hoogland and Murfet, "Structural inference: interpreting small language
    models with susceptibilities", 2025 (arXiv:2504.18274), appendix C.4, in the form and sign that
    devinterp 2.0.1 computes (without the factor nβ).

    Args:
        runs: The record of each component, and of the whole network, by name, as
            `sample_components` gives them. All recorded the same observables.
        of: Name of the observable that holds the losses ℓ.
        loss: Name of the observable whose mean over all its entries is L, the loss on the data that
            is sampled from (default: `of`).
        full: The name of the whole network's run.
        initial_loss: L(w*) (default: the full run's). An error of it changes χ_i by as much times
            (E_C − E)(ℓ_i − L).
        per: As for `influence`, for ℓ.

    Returns:
        `[components, …]`, of all runs but the full one, in their order; with the number of chains
        of the run that has fewest, and that of frozen ones of all.

    Raises:
        TypeError, ValueError: As `influence`; L(w*) is not known, or there is no full run.
    """
    checks.instance("runs", runs, Mapping)
    for argument, name in (("of", of), ("full", full), ("loss", of if loss is None else loss)):
        checks.instance(argument, name, str)
    checks.choice("per", per, ("example", "token"))
    if full not in runs:
        raise ValueError(f"runs must have {full!r}, the whole network, got {', '.join(runs)}")
    names = tuple(name for name in runs if name != full)
    if not names:
        raise ValueError(f"runs must have a component beside {full!r}, got none")
    for samples in runs.values():
        _check(samples)
    start = _initial_loss(runs[full], initial_loss)
    of_loss = of if loss is None else loss
    away = _away(runs[full], of, of_loss, per)[0]
    gap = means_over_draws(away, lambda values: values.mean(0))  # E L − E ℓ_i
    found = []
    for name in names:
        away, losses = _away(runs[name], of, of_loss, per)
        if away.shape[2:] != gap.mean.shape:
            raise ValueError(
                f"runs must have recorded the same losses, got {tuple(away.shape[2:])} in "
                f"{name!r} and {tuple(gap.mean.shape)} in {full!r}"
            )
        rise = (losses - start).reshape(*losses.shape, *(1,) * (away.ndim - 2))
        here = means_over_draws(rise * (away - gap.mean), lambda values: values.mean(0))
        # Both runs are independent; E_C φ multiplies the error of the full one.
        errors = torch.hypot(here.mcse, rise.mean().abs() * gap.mcse)
        found.append((here.mean, errors))
    values, mcse = (torch.stack(each) for each in zip(*found, strict=True))
    chains = min(int(samples.healthy.sum()) for samples in runs.values())
    frozen = sum(int((~samples.healthy).sum()) for samples in runs.values())
    return Response(values, mcse, chains, frozen, names)


def _away(samples: Samples, of: str, loss: str, per: Per) -> tuple[Tensor, Tensor]:
    """L − ℓ_i and L at each draw, `[C, D, …]` and `[C, D]`, float64."""
    losses = _trace(samples, "of", of, per).double()
    values = _trace(samples, "loss", loss, "token").double()
    values = values.reshape(*values.shape[:2], -1).nanmean(-1)
    return values.reshape(*values.shape, *(1,) * (losses.ndim - 2)) - losses, values


def _initial_loss(samples: Samples, given: float | None) -> float:
    """L(w*), as given or as the run knows it.

    Raises:
        TypeError, ValueError: It is no finite number, or not known.
    """
    if given is not None:
        checks.finite_number("initial_loss", given)
        return float(given)
    if samples.initial_loss is None or samples.initial_loss.ndim:
        raise ValueError("initial_loss must be given: the full run does not know L(w*)")
    return float(samples.initial_loss)


def trace_of(samples: Any, of: Any) -> Tensor:
    """The values of an observable of healthy chains, `[C, D, …]`, once they were found poolable.

    Raises:
        TypeError, ValueError: As `influence`.
    """
    _check(samples)
    return _trace(samples, "of", of, "token")


def _check(samples: Any, *, one_law: bool = True) -> None:
    """Refuse draws whose moments would mean nothing.

    Raises:
        TypeError, ValueError: As `influence`.
    """
    checks.instance("samples", samples, Samples)
    samples.check_poolable()
    if one_law:
        check_one_law(samples)


def _response(samples: Samples, values: Tensor, mcse: Tensor) -> Response:
    number = int(samples.healthy.sum())
    return Response(values, mcse.reshape(values.shape), number, samples.num_chains - number)


def _trace(samples: Samples, argument: str, given: Any, per: Per) -> Tensor:
    """Values of an observable of healthy chains, `[C, D, …]`, averaged as `per` says.

    Raises:
        TypeError, ValueError: There are none, or they are not those of the run's draws.
    """
    if isinstance(given, str):
        if given not in samples.observable_names:
            known = ", ".join(map(repr, samples.observable_names)) or "none"
            raise ValueError(
                f"{argument} must be an observable whose values were recorded, got {given!r}, "
                f"where there are {known}"
            )
        values = samples.observable(given)
    elif isinstance(given, Tensor) and not given.is_complex() and not given.is_meta:
        values = given.detach().cpu()
    else:
        raise TypeError(
            f"{argument} must be the name of an observable, or real values of one, got "
            f"{type(given).__name__}"
        )
    expected = (samples.num_chains, samples.num_draws)
    if values.shape[:2] != expected:
        raise ValueError(
            f"{argument} must have values [chains, draws, …] = {list(expected)}, got shape "
            f"{tuple(values.shape)}"
        )
    values = values[samples.healthy]
    values = values if values.is_floating_point() else values.double()
    if per == "example" and values.ndim > 3:
        return values.double().nanmean(tuple(range(3, values.ndim)))
    return values


def _has_moments_only(samples: Samples, of: Any, on: Any) -> bool:
    """Whether the values of the observables were not recorded, but their moments were."""
    moments = samples.observable_moments
    if moments is None or isinstance(on, Tensor):
        return False
    names = set(moments.means.keys())
    return of in names and (on is None or on in names)
