"""The house as its plan says: names that reach what they name, and a door that is documented."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import compat
import funcsgmcmc as fs
import funcsgmcmc.testing


def modules(package: ModuleType) -> list[str]:
    """The dotted names of all modules of a package."""
    return [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]


@pytest.mark.parametrize("name", modules(fs))
def test_no_function_hides_a_module(name):
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    assert getattr(sys.modules[parent], last) is module


EXTRAS = {"arviz_base", "arviz_stats", "matplotlib", "pandas", "scipy", "tqdm", "xarray", "zarr"}


@pytest.mark.parametrize("name", modules(fs))
def test_functions_import_extras_only(name):
    """The order of modules is kept by the contracts of import-linter, in pyproject.toml."""
    source = Path(importlib.util.find_spec(name).origin).read_text()
    imports = [
        node
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    ]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in imports if isinstance(node, ast.ImportFrom)]
    assert {each.partition(".")[0] for each in names} <= EXTRAS


def test_compat_is_one_package_under_two_names():
    assert compat is fs.compat
    for name in modules(fs.compat):
        assert sys.modules[name.removeprefix("funcsgmcmc.")] is sys.modules[name]


@pytest.mark.parametrize("kind", ["compat.py", "compat/__init__.py"])
def test_a_compat_that_is_hidden_is_named(kind, tmp_path):
    other = tmp_path / kind
    other.parent.mkdir(exist_ok=True)
    other.write_text("")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import compat; compat.SGLD"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"compat of funcsgmcmc hides another one, {other}" in found.stderr


def test_the_safe_name_needs_no_other(tmp_path):
    (tmp_path / "compat.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import compat, funcsgmcmc.compat\n"
        "from funcsgmcmc.compat.utils import default_nbeta\n"
        "assert not hasattr(compat, 'SGLD') and funcsgmcmc.compat.SGLD\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_the_door_is_small_and_documented():
    assert len(fs.__all__) <= 48, "the door is full: CONTRIBUTING.md says what to do"
    assert [name for name in fs.__all__ if not inspect.getdoc(getattr(fs, name))] == []


def test_what_type_checkers_read_is_what_is_found():
    """The imports that run for type checkers only, and the table that is used where code runs."""
    (checked,) = (
        node.body
        for node in ast.parse(Path(fs.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    homes = {alias.name: node.module for node in checked for alias in node.names}
    assert set(homes) == set(fs.__all__)
    for name, home in homes.items():
        module = importlib.import_module(home)
        value = getattr(module, name, None) or importlib.import_module(f"{home}.{name}")
        assert getattr(fs, name) is value
        assert name in dir(fs)


def test_a_stored_class_of_the_library_is_imported(tmp_path):
    """A program opens the run of a sampler that it has not used."""
    fs.sample(
        lambda params, batch: (params["w"] - batch.mean()).square().sum(),
        {"w": torch.zeros(2)},
        torch.ones(4),
        fs.sgnht(0.01, nbeta=1.0, diffusion_factor=0.1),
        num_chains=2,
        num_draws=2,
        key=fs.key(0),
        store=tmp_path / "run.zarr",
    )
    code = (
        "import sys, funcsgmcmc as fs\n"
        f"state = fs.open_run({str(tmp_path / 'run.zarr')!r}).state\n"
        "assert type(state).__name__ == 'ThermostatState' and state.thermostat.shape == (2,)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_used_is_not_imported():
    """… such as what needs an extra, and torch's attention over processes."""
    code = (
        "import sys, funcsgmcmc as fs\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(fs.__all__) <= set(dir(fs))\n"
        "fs.sample, fs.sgld\n"
        "assert 'funcsgmcmc.samplers.sgnht' not in sys.modules\n"
        "assert 'funcsgmcmc.estimates.plots' not in sys.modules\n"
        "assert 'torch.distributed.tensor.experimental._attention' not in sys.modules\n"
        "from funcsgmcmc import *\n"
        "assert sgnht is fs.sgnht and plots.plot_llc and fs.memory.keep_freed_memory\n"
        "assert 'hypothesis' not in sys.modules\n"
        "assert fs.testing.check_laws\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="'funcsgmcmc' has no attribute 'lcc'"):
        _ = fs.lcc
