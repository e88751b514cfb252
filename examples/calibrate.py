"""From a trained network to a calibrated learning coefficient, on scikit-learn's digits.

Trains a 64-64-10 network, sweeps step size and inverse temperature in one run, prints a table with
a verdict on each cell, writes `digits_sweep.png`, and estimates the coefficient of each layer with
the settings that are recommended. Takes about two minutes.
"""

import functools

import torch
from digits import load, train
from torch import nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs


def main() -> None:
    torch.manual_seed(0)
    images, labels = load()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(model, images, labels, epochs=600)
    nbeta = fs.default_nbeta(len(images))
    run = functools.partial(
        fs.sweep,
        fs.module_loss(model, cross_entropy),
        fs.params_of(model),
        (images, labels),
        fs.baoa,
        chains_per_cell=4,
        num_draws=300,
        num_burnin_steps=300,
        num_steps_between_draws=2,
        batch_size=256,
        key=fs.key(0),
        full_loss=30,
    )

    grid = {
        "lr": [0.002, 0.005, 0.012, 0.03, 0.08, 0.2],
        "nbeta": [0.0, nbeta / 4, nbeta],
        "localization": 100.0,
    }
    print(run(grid=grid, dry_run=True))
    swept = run(grid=grid)
    print(swept)
    chosen = swept.recommend(nbeta=nbeta)
    print(f"\nrecommended: {chosen}")
    fs.plots.plot_sweep(swept).savefig("digits_sweep.png", dpi=150)
    print("wrote digits_sweep.png")

    # The same settings for each layer: the others stay where they are.
    layers = run(
        grid={
            **chosen.settings,
            "only": {"all": "*", "first layer": "0.*", "second layer": "2.*"},
        }
    )
    print(f"\n{layers}")


if __name__ == "__main__":
    main()
