"""What must work where the package has just been installed.

    python smoke.py

It needs the extra `diagnostics`, and nothing of the repository: `tests/dist_check.py` copies it
into an empty folder.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss

import compat
import funcsgmcmc as fs
from funcsgmcmc.info import info


def main() -> None:
    package = Path(fs.__file__).parent
    assert Path(sys.prefix) in package.parents, f"{package} is not that of {sys.prefix}"
    assert (package / "py.typed").exists()
    assert version("funcsgmcmc") == fs.__version__
    assert not (package.parent / "tests").exists()

    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    targets = inputs.sum(1, keepdim=True)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    samples = fs.sample(
        fs.module_loss(model, mse_loss),
        fs.params_of(model),
        (inputs, targets),
        fs.sgld(1e-3, nbeta=10.0, localization=1.0),
        num_chains=4,
        num_draws=50,
        batch_size=16,
        key=fs.key(0),
    )
    estimate = fs.llc(samples)
    assert estimate.error > 0

    optimizer = compat.SGMCMC.sgld(model.parameters(), lr=1e-4, nbeta=10.0, localization=1.0)
    mse_loss(model(inputs), targets).backward()
    optimizer.step()

    print(estimate)
    print(", ".join(f"{name} {info()[name]}" for name in ("python", "torch", "tensordict")))


if __name__ == "__main__":
    main()
