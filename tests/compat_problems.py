"""What the tests of `compat` share."""

from typing import Any

import pytest
import torch
from torch import nn

# The settings of most tests are not those that the optimizers recommend.
QUIET = [
    pytest.mark.filterwarnings("ignore:nbeta is 1"),
    pytest.mark.filterwarnings("ignore:noise_level is"),
    pytest.mark.filterwarnings("ignore:(SGLD|SGNHT) is deprecated"),
    pytest.mark.filterwarnings("ignore:nbeta set to 1"),
]
NOISELESS = {"noise_level": 0.0, "nbeta": 2.0}


def parameter(*values: float) -> nn.Parameter:
    """A vector to sample."""
    return nn.Parameter(torch.tensor(values))


def quadratic_step(optimizer: Any, *params: nn.Parameter) -> None:
    """A step with the gradient of ‖w‖²/2."""
    for param in params:
        param.grad = param.detach().clone()
    optimizer.step()
