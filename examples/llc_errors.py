"""What step size and minibatches do to a learning coefficient, where its value is known.

Linear regression with ten parameters and 1,000 examples: λ = (1/2) Σ nβ hᵢ/(nβ hᵢ + γ), with hᵢ the
curvatures of the loss. Prints a table: two samplers, with and without control variates, two step
sizes and three batch sizes. Takes two to three minutes on two cores.
"""

import math

import torch
from tensordict import TensorDict
from torch import Tensor

import funcsgmcmc as fs

NUM_EXAMPLES, NUM_PARAMETERS, LOCALIZATION = 1000, 10, 1.0


def loss(params: TensorDict, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the mean squared error."""
    inputs, targets = batch
    return ((inputs @ params["w"] - targets) ** 2).mean() / 2


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    inputs = torch.randn(NUM_EXAMPLES, NUM_PARAMETERS)
    targets = inputs @ torch.randn(NUM_PARAMETERS) + torch.randn(NUM_EXAMPLES)
    minimum = TensorDict({"w": torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]})
    nbeta = fs.default_nbeta(NUM_EXAMPLES)
    curvature = nbeta * torch.linalg.eigvalsh(inputs.T @ inputs / NUM_EXAMPLES)
    truth = float((curvature / (curvature + LOCALIZATION)).sum() / 2)
    print(
        f"known value {truth:.3f}\n\n| batch | ε | sampler | λ̂ ± total error | without its bias |"
    )
    print("|---|---|---|---|---|")
    for batch_size in (None, 100, 20):
        for lr in (2e-3, 1e-3):
            pull = {"nbeta": nbeta, "localization": LOCALIZATION}
            # BAOA's step h = √(ε/2) costs and mixes as SGLD's ε.
            samplers = {"SGLD": fs.sgld(lr, **pull), "BAOA": fs.baoa(math.sqrt(lr / 2), **pull)}
            for name, sampler in samplers.items():
                for loss_fn in (loss, fs.control_variates(loss)):
                    if batch_size is None and loss_fn is not loss:
                        continue  # all data has no noise to take out
                    samples = fs.sample(
                        loss_fn,
                        minimum,
                        (inputs, targets),
                        sampler,
                        num_chains=64,
                        num_draws=400,
                        num_burnin_steps=600,
                        num_steps_between_draws=4,
                        batch_size=batch_size,
                        key=fs.key(0),
                        full_loss=50,
                    )
                    found = fs.llc(samples)
                    label = name if loss_fn is loss else f"{name}, control variates"
                    print(
                        f"| {batch_size or 'all'} | {lr:g} | {label} | {found.mean:.2f} ± "
                        f"{found.error:.2f} | {found.corrected:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
