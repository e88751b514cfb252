"""What each draw contributes to the learning coefficient."""

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.runs.attributes import settings_of_draws
from funcsgmcmc.runs.record import Samples, check_initial_loss


def llc_draws(samples: Samples, initial_loss: float | Tensor | None = None) -> Tensor:
    """The learning coefficient's contribution of each draw.

        λ̂_{c,d} = (nβ/T) (L_B(w_{c,d}) − L_n(w₀))

    with nβ and the temperature T those of the step that led to the draw (T σ² with a noise level
    σ), L_B the loss on the draw's minibatch and L_n(w₀) the loss on all data at the anchor. L_B is
    unbiased for L_n(w) where the batch is independent of w: drawn with replacement, or all data. It
    is not with `minibatches="epochs"` or an iterable that is passed over again, where a chain has
    just been pulled by the other batches of the epoch: there λ̂ is biased upwards.

    Source: Lau et al. 2023 (arXiv:2308.12108), eq. 8.

    Args:
        samples: A run.
        initial_loss: L_n(w₀), `[]` or `[C]` (default: the run's).

    Returns:
        `[C, D]`, float64; NaN from where a chain was frozen.

    Raises:
        ValueError: Neither the run nor the argument gives L_n(w₀), or a temperature is 0.
    """
    checks.instance("samples", samples, Samples)
    scale, anchor_loss = _scale_and_anchor_loss(samples, initial_loss)
    return scale * (samples.draw_losses.double() - anchor_loss)


def _scale_and_anchor_loss(
    samples: Samples, initial_loss: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """nβ/T of the draws, `[C, D]`, and L_n(w₀), `[C, 1]` or `[1, 1]`.

    Raises:
        ValueError: As `llc_draws`.
    """
    anchor_loss = samples.initial_loss if initial_loss is None else initial_loss
    if anchor_loss is None:
        raise ValueError(
            "initial_loss must be given: the run's data could not be passed over twice, "
            "so that L(w0) on all data is not known"
        )
    # A run's own may be infinite for a chain that is frozen at once.
    if initial_loss is not None:
        anchor_loss = check_initial_loss(initial_loss, samples.num_chains)
    anchor_loss = torch.as_tensor(anchor_loss, dtype=torch.float64).reshape(-1, 1)
    nbeta, temperature = settings_of_draws(samples)
    if not (temperature > 0).all():
        raise ValueError(f"temperature must be > 0 at the draws, got {float(temperature.min()):g}")
    return nbeta / temperature, anchor_loss


def full_llc_draws(
    samples: Samples, initial_loss: float | Tensor | None = None, *, of_part: bool = False
) -> Tensor:
    """The learning coefficient's contribution of each look at all data: `llc_draws` with L_n(w).

    Args:
        samples: A run.
        initial_loss: As for `llc_draws`.
        of_part: Whether looks at a part of the data will do, with their loss in place of L_n.

    Returns:
        `[C, K]`, float64.

    Raises:
        ValueError: As `llc_draws`; or the run has no looks at all data.
    """
    looks = samples.looks
    if looks is None or not (looks.is_all or of_part):
        raise ValueError("the run must have losses on all data: full_loss=… evaluates them")
    scale, anchor_loss = _scale_and_anchor_loss(samples, initial_loss)
    return scale[:, looks.draws] * (looks.losses.double() - anchor_loss)


def forces_and_noises(samples: Samples) -> tuple[Tensor, Tensor]:
    """Means over the looks of each chain's force and gradient noise, as `Look` defines them.

    A part of n' of n examples has a gradient with noise of its own, V' = V (m/n') (1 − n'/n) for
    minibatches of m: so much is more in the force, and in the difference of both gradients.

    Args:
        samples: A run with looks.

    Returns:
        Both `[C]`, float64.
    """
    looks = samples.looks
    assert looks is not None
    forces, noises = looks.forces.double().mean(1), looks.noises.double().mean(1)
    if looks.is_all:
        return forces, noises
    size, number = samples.options["batch_size"], samples.options["num_examples"]
    assert looks.num_examples is not None  # a part has its number
    ratio = size / looks.num_examples * (1 - looks.num_examples / number)
    noises = noises / (1 + ratio)
    return (forces - ratio * noises).clamp(min=0), noises
