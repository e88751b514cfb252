"""Pulls of the prior on the parameters: gradients of −log p(w).

The posterior that every sampler here targets has the potential

    U(w) = nβ L(w) + (γ/2) ‖w − w₀‖² + (λ/2) ‖w‖² − log p(w)

with γ ↔ `localization`, w₀ ↔ `anchor`, λ ↔ `weight_decay` and log p ↔ `log_prior`, a user's
log-density (up to a constant). The first two pulls are Gaussian, with a precision and a centre.
"""

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.tree import AnyTree, Scalar

LogPrior = Callable[[TensorDict], Tensor]


def displacement(params: AnyTree, center: AnyTree) -> AnyTree:
    """Displacement w − w₀, the direction of the pull to a centre, in float32 or better.

    Args:
        params: w, a tree of batch size `[*chains]`.
        center: w₀, of the same structure, of batch size `[]` or `[*chains]`.
    """

    def difference(leaf: Tensor, middle: Tensor) -> Tensor:
        # w − w₀ is small: its digits are lost in a narrow dtype.
        return tree.widened(leaf) - tree.widened(middle)

    return tree.map_leaves(difference, params, center)


def gaussian_pull(displacement: AnyTree, precision: Scalar) -> AnyTree:
    """Gradient of (precision/2) ‖displacement‖².

    Args:
        displacement: w − w₀ for a prior centred at w₀, w for one centred at zero; a tree of batch
            size `[*chains]`.
        precision: `[*chains]` or `[]`, in units of 1/w².

    Returns:
        precision · displacement.
    """
    view = tree.expander(precision)
    return tree.map_leaves(lambda leaf: view(leaf) * leaf, displacement)


def log_prior_pull(log_prior: LogPrior) -> Callable[[TensorDict], tuple[TensorDict, Tensor]]:
    """Make the function w ↦ (−∇ log p(w), log p(w)).

    Args:
        log_prior: Takes one chain's parameters, returns the scalar log p(w) + constant.

    Returns:
        A pure function of one chain's parameters, to be vmapped over chains.

    Raises:
        TypeError, ValueError: When called, if `log_prior` does not return a real scalar.
    """

    def potential(params: TensorDict) -> tuple[Tensor, Tensor]:
        value = checks.scalar("log_prior", log_prior(params))
        # The value comes along for samplers that look at the energy.
        return -value, value

    whole_pull = torch.func.grad(potential, has_aux=True)

    def pull(params: TensorDict) -> tuple[TensorDict, Tensor]:
        if not tree.is_sharded(params):
            return whole_pull(params)
        names = tree.names(params)

        def of_leaves(given: Sequence[Tensor]) -> tuple[Tensor, None]:
            leaves = dict(zip(names, given, strict=True))
            return potential(tree.build(leaves, params.batch_size))[0], None

        grads, value, _ = shards.grads_and_value(of_leaves, [params[name] for name in names])
        return tree.build(dict(zip(names, grads, strict=True)), params.batch_size), -value

    return pull
