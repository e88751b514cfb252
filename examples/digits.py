"""Local learning coefficient of a small network trained on scikit-learn's digits.

Trains a 64-64-10 network on 1,797 real images, samples its local posterior with 64 chains of
localized BAOA, prints the estimate with its diagnostics, and writes `digits_llc.png`.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs


def load() -> tuple[Tensor, Tensor]:
    """Images `[1797, 64]`, scaled to [0, 1], and labels `[1797]`."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 2000) -> None:
    """Minimize the cross-entropy by Adam to convergence.

    The weight decay keeps the minimum from escaping to infinity, as it would for data that can be
    separated.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    torch.manual_seed(0)
    images, labels = load()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    start = time.perf_counter()
    train(model, images, labels)
    accuracy = (model(images).argmax(1) == labels).double().mean()
    seconds = time.perf_counter() - start
    print(f"trained in {seconds:.1f} s: accuracy {accuracy:.4f} on its {len(images)} images")

    start = time.perf_counter()
    samples = fs.sample(
        # Twice the gradients, and about half of the minibatches' noise.
        fs.control_variates(fs.module_loss(model, cross_entropy)),
        fs.params_of(model),
        (images, labels),
        fs.baoa(lr=0.015, nbeta=fs.default_nbeta(len(images)), localization=100.0),
        num_chains=64,
        num_draws=600,
        num_burnin_steps=300,
        batch_size=128,
        key=fs.key(0),
        progress=True,
    )
    seconds = time.perf_counter() - start
    print(f"sampled in {seconds:.1f} s: {samples.num_chains} chains, {samples.num_steps} steps\n")
    print(fs.summary(samples), end="\n\n")
    print(fs.llc(samples))
    fs.plots.plot_llc(samples).savefig("digits_llc.png", dpi=150)
    print("wrote digits_llc.png")


if __name__ == "__main__":
    main()
