"""`funcsgmcmc.compat` under the name that is shorter, and not ours alone.

`compat.x` is `funcsgmcmc.compat.x`, the same module: this file puts it under both names. Where
another package or module called `compat` can be imported as well, this one hides it, and says so.
"""

import importlib
import pkgutil
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

from funcsgmcmc import compat as _package
from funcsgmcmc.compat import SGLD, SGMCMC, SGNHT, SamplingMethodLiteral

__all__ = ["SGLD", "SGMCMC", "SGNHT", "SamplingMethodLiteral"]


def _hidden() -> list[str]:
    """Where else on the path a `compat` stands that is no copy of this one."""
    found = {
        Path(spec.origin)
        for entry in sys.path
        if (spec := PathFinder.find_spec("compat", [entry])) is not None and spec.origin
    }
    return [str(path) for path in found if not (path.parents[1] / "funcsgmcmc").is_dir()]


for _path in _hidden():
    warnings.warn(
        f"compat of funcsgmcmc hides another one, {_path}: take it off the path, or import "
        "funcsgmcmc.compat and let the other come first",
        stacklevel=2,
    )

sys.modules[__name__] = _package
for _module in pkgutil.iter_modules(_package.__path__):
    sys.modules[f"{__name__}.{_module.name}"] = importlib.import_module(
        f"{_package.__name__}.{_module.name}"
    )
