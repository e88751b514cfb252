"""Prediction by all draws of a run: outputs averaged over the posterior, and how good they are.

    p(y | x)  =  E p(y | x, w)  ≈  (1/S) Σ_s p(y | x, w_s)

over S draws of all chains. Shapes: n inputs; outputs `[n, …]`; K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, tree
from funcsgmcmc.batches import check_batch_size, check_examples, map_examples, pieces_of, plain
from funcsgmcmc.estimates.batch_means import BatchMeans, batches_of, means_over_draws
from funcsgmcmc.estimates.response import Response, trace_of
from funcsgmcmc.losses import module_loss
from funcsgmcmc.runs.record import Samples


@dataclass(frozen=True, eq=False, repr=False)
class Predictive:
    """Outputs over the draws of all chains, each `[n, …]`, float64.

    Attributes:
        mean: The mean: of class probabilities, those of the posterior predictive.
        std: The standard deviation over draws: how far they disagree.
        mcse: The Monte Carlo standard error of `mean`; NaN of fewer than four draws of one chain.
        num_draws: How many draws these are, of all chains.
    """

    mean: Tensor
    std: Tensor
    mcse: Tensor
    num_draws: int

    def __repr__(self) -> str:
        return f"Predictive(outputs {list(self.mean.shape)}, {self.num_draws} draws)"


def predictive(
    model: nn.Module,
    draws: Samples | TensorDictBase,
    inputs: Any,
    *,
    transform: Callable[[Any], Tensor] | None = None,
    batch_size: int | None = None,
    draws_at_once: int = 1,
) -> Predictive:
    """Predict with all draws: mean and spread of a model's outputs over the posterior.

    Args:
        model: The module that was sampled; parameters that the draws lack keep its values.
        draws: A run with `record=["draws"]`, of which frozen chains are left out; or draws, a tree
            of batch size `[C, D]`, or `[D]` of one chain.
        inputs: Tensors `[n, …]`, as `module_loss` takes a batch without targets: one tensor, or a
            dict of keyword arguments.
        transform: A function of the outputs that is averaged, for instance `torch.nn.Softmax(-1)`:
            probabilities average to those of the posterior predictive, logits do not. Default: the
            outputs as they are.
        batch_size: Inputs that are evaluated at once (default: all).
        draws_at_once: Draws that are evaluated at once, by `torch.vmap`.

    Returns:
        Mean, standard deviation and Monte Carlo error, each `[n, …]`.

    Raises:
        TypeError, ValueError: An argument is none of the above; the run has no draws, chains have
            different settings, or the draws have weights; or the outputs are not one for each
            input.
    """
    checks.instance("model", model, nn.Module)
    if transform is not None:
        checks.function("transform", transform)
    checks.count("draws_at_once", draws_at_once, minimum=1)
    chains = _draws_of(draws)
    number = check_examples(pytree.tree_leaves(plain(inputs)))
    size = check_batch_size(batch_size, number)
    evaluate = module_loss(model, _Transformed(transform))
    parts = []
    with torch.no_grad():
        for piece, length in pieces_of(plain(inputs), number, size):
            try:
                parts.append(_piece(evaluate, chains, piece, length, draws_at_once))
            except Exception as error:
                error.add_note("This happened when the model was evaluated on a piece of inputs.")
                raise
    mean, variance, mcse = (torch.cat(each) for each in zip(*parts, strict=True))
    return Predictive(mean, variance.sqrt(), mcse, chains.batch_size.numel())


class _Transformed:
    """A criterion that gives the outputs themselves, transformed, in place of a loss."""

    def __init__(self, transform: Callable[[Any], Tensor] | None) -> None:
        self._transform = transform

    def __call__(self, output: Any, _: Any) -> Tensor:
        if self._transform is not None:
            output = self._transform(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the outputs must be a tensor, got {type(output).__name__}: transform=… makes one"
            )
        return output


def _draws_of(given: Any) -> TensorDict:
    """Draws of healthy chains, of batch size `[C, D]`.

    Raises:
        TypeError, ValueError: There are none.
    """
    if isinstance(given, Samples):
        given.check_poolable()
        if given.draws is None:
            raise ValueError("draws must have been recorded: sample(…, record=['draws'])")
        given = given.draws[given.healthy]
    if not isinstance(given, TensorDictBase):
        raise TypeError(f"draws must be a run or a TensorDict, got {type(given).__name__}")
    found = tree.parameters(given, "draws")
    if found.batch_dims not in (1, 2) or not found.batch_size.numel():
        raise ValueError(
            f"draws must have batch size [chains, draws] or [draws], got {list(found.batch_size)}"
        )
    return found if found.batch_dims == 2 else found[None]


def _piece(
    evaluate: Callable[[TensorDict, Any], Tensor],
    draws: TensorDict,
    inputs: Any,
    length: int,
    at_once: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and error of the outputs of some inputs, `[b, …]` each."""
    device = tree.device(draws)
    batch = map_examples(lambda leaf: leaf.to(device), inputs)
    num_chains, num_draws = draws.batch_size
    means, squares = BatchMeans(), 0.0
    shift: Any = None
    for chain in range(num_chains):
        for part in batches_of(num_chains, num_draws):
            total: Any = 0.0
            for first in range(part.start, part.stop, at_once):
                few = draws[chain, first : min(first + at_once, part.stop)]
                outputs = _outputs(evaluate, few, batch).double()
                if outputs.shape[1:2] != (length,):
                    raise ValueError(
                        f"the outputs must have one row for each of {length} inputs, got shape "
                        f"{tuple(outputs.shape[1:])}"
                    )
                # Around the first, so that a small spread around a large mean is not lost.
                shift = outputs[0].clone() if shift is None else shift
                total = total + (outputs - shift).sum(0)
                squares = squares + (outputs - shift).square().sum(0)
            means.add(shift + total / (part.stop - part.start), part.stop - part.start)
        means.end_chain()
    away = means.mean - shift
    variance = (squares / draws.batch_size.numel() - away.square()).clamp(min=0)
    return means.mean.cpu(), variance.cpu(), means.mcse.cpu()


def _outputs(
    evaluate: Callable[[TensorDict, Any], Tensor], draws: TensorDict, batch: Any
) -> Tensor:
    """Outputs of a few draws, `[d, b, …]`."""
    if len(draws) == 1:
        return evaluate(draws[0], batch)[None]
    return torch.vmap(evaluate, in_dims=(0, None))(draws, batch)


def log_predictive_density(samples: Samples, of: str) -> Response:
    """Estimate the log pointwise predictive density of examples.

        lppd_i = log E p(y_i | x_i, w) = log E e^(−ℓ_i)

    Their sum over a test set is the usual score of a posterior predictive.

    Source: Gelman, Hwang and Vehtari, "Understanding predictive information criteria for Bayesian
    models", Statistics and Computing 24 (2014), eq. 5.

    Args:
        samples: A run.
        of: Name of the observable that holds ℓ_i = −log p(y_i | x_i, w), as `losses_on` records it
            with a cross-entropy that is not averaged.

    Returns:
        `[n]`, or `[n, T]` of tokens, with their Monte Carlo errors (the delta method).

    Raises:
        TypeError, ValueError: As `influence`.
    """
    trace = trace_of(samples, of)
    # Relative to the largest, so that nothing overflows.
    least = trace.amin((0, 1)).double()
    found = means_over_draws(trace, lambda losses: (least - losses).exp().mean(0))
    number = int(samples.healthy.sum())
    return Response(
        found.mean.log() - least, found.mcse / found.mean, number, samples.num_chains - number
    )


def calibration_error(probabilities: Tensor, targets: Tensor, *, num_bins: int = 15) -> float:
    """Measure how far stated confidence is from accuracy: the expected calibration error.

        ECE = Σ_b (n_b/n) |accuracy_b − confidence_b|

    over bins b of equal width of the confidence, the probability of the most probable class.

    Source: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017
    (arXiv:1706.04599), eq. 3 and 5.

    Args:
        probabilities: Of classes, `[n, K]`, each row of which adds up to 1:
            `predictive(model, samples, inputs, transform=torch.nn.Softmax(-1)).mean`.
        targets: The classes, integers `[n]`.
        num_bins: How many bins.

    Raises:
        TypeError, ValueError: An argument is none of the above.
    """
    checks.instance("probabilities", probabilities, Tensor)
    checks.instance("targets", targets, Tensor)
    checks.count("num_bins", num_bins, minimum=1)
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or not len(probabilities):
        raise ValueError(
            f"probabilities must be real, [n, classes], got {probabilities.dtype} of shape "
            f"{tuple(probabilities.shape)}"
        )
    if targets.shape != probabilities.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets must be {len(probabilities)} integers, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    total = probabilities.double().sum(1)
    if not bool(((total - 1).abs() < 1e-3).all() and (probabilities >= 0).all()):
        raise ValueError(
            "probabilities must be >= 0 and add up to 1: transform=torch.nn.Softmax(-1)"
        )
    confidence, chosen = probabilities.double().max(1)
    right = (chosen == targets).double()
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=bins.device)
    gaps.index_add_(0, bins, right - confidence)
    error = float(gaps.abs().sum() / len(right))
    assert not math.isnan(error)  # probabilities were checked
    return error
