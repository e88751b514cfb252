"""The house as its plan says: names that reach what they name, and a door that is documented."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import compat
import funcsgmcmc as fs
import funcsgmcmc.testing


def modules(package: ModuleType) -> list[str]:
    """The dotted names of all modules of a package."""
    return [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]


@pytest.mark.parametrize("name", modules(fs) + modules(compat))
def test_no_function_hides_a_module(name):
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    assert getattr(sys.modules[parent], last) is module


def test_the_door_is_small_and_documented():
    assert len(fs.__all__) <= 40
    assert [name for name in fs.__all__ if not inspect.getdoc(getattr(fs, name))] == []


def test_testing_is_found_behind_the_door():
    """… and only where it is asked for: it needs an extra."""
    code = (
        "import sys, funcsgmcmc as fs\n"
        "assert 'hypothesis' not in sys.modules\n"
        "assert fs.testing.check_laws\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="'funcsgmcmc' has no attribute 'lcc'"):
        _ = fs.lcc
