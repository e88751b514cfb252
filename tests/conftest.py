"""Settings of all tests: float64, and hypothesis without surprises."""

import os

import hypothesis
import pytest
import torch

import funcsgmcmc
from problems import classification

hypothesis.settings.register_profile(
    "project", deadline=None, derandomize=True, max_examples=40, print_blob=True
)
hypothesis.settings.load_profile("project")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other cores have tests of their own


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def params():
    """Parameters of the classification problem."""
    torch.set_default_dtype(torch.float64)
    return funcsgmcmc.params_of(classification()[0])
