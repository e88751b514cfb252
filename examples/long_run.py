"""A run that can be killed at any moment, and started again until it is complete.

    python examples/long_run.py run.zarr

Kill it, by Ctrl-C or with SIGKILL, and give the same command again: it goes on from its last
checkpoint, and its record is that of a run that nobody stopped. It takes some minutes in all.
"""

import sys

import torch
from torch import nn
from torch.nn.functional import mse_loss

import funcsgmcmc as fs


def main(store: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2000, 16)
    targets = inputs[:, :1] * inputs[:, 1:2] + 0.1 * torch.randn(2000, 1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(500):  # the same network each time: it is part of what a run is known by
        optimizer.zero_grad()
        mse_loss(model(inputs), targets).backward()
        optimizer.step()
    samples = fs.sample(
        fs.module_loss(model, mse_loss),
        fs.params_of(model),
        (inputs, targets),
        fs.baoa(lr=0.01, nbeta=fs.default_nbeta(2000), localization=10.0),
        num_chains=16,
        num_draws=2000,
        num_burnin_steps=2000,
        num_steps_between_draws=20,
        batch_size=256,
        key=fs.key(0),
        record=["draw_moments"],
        progress=True,
        store=store,
        resume=True,
    )
    print(fs.llc(samples))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
