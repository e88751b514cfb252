"""`make mutants`: break the update mathematics in every way listed, and see which test notices.

Each mutant runs in a process of its own, in which importing the mutated module compiles the changed
tree; no file is changed. Its tests run until the first fails: first those of `funcsgmcmc.testing`
(laws and tests of what is sampled), which any sampler has, then the project's own.
"""

import argparse
import importlib.machinery
import multiprocessing
import os
import queue
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import Phase
from mutant import Mutant
from mutants import MUTANTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mutants.md"
SECONDS = 300
DEBUG = "--debug" in sys.argv
INTERRUPTED = pytest.ExitCode.INTERRUPTED  # a file of tests could not be imported
LAWS = "tests/test_laws.py"


def laws_of(*samplers: str) -> list[str]:
    """The law tests of some samplers."""
    return [LAWS, "-k", " or ".join(f"obeys[{sampler}-" for sampler in samplers)]


COMPAT = ["tests/test_compat_differences.py", "tests/test_compat_metrics.py"]

# Tests in order: what is likely to notice first.
TESTS: dict[str, list[list[str]]] = {
    "samplers.langevin": [laws_of("sgld"), [LAWS, "-k", "preconditioner_obeys"]],
    "samplers.sgld": [laws_of("sgld", "rmsprop_sgld")],
    "samplers.cyclical_sgld": [laws_of("cyclical_sgld")],
    "samplers.base": [laws_of("sgld", "sghmc"), [LAWS, "-k", "refused"]],
    "samplers.settings": [laws_of("sgld"), [LAWS, "-k", "refused"]],
    "priors": [laws_of("sgld", "contour_sgld"), [LAWS, "-k", "log_prior"]],
    "terms": [laws_of("sgld", "sghmc", "baoa"), ["tests/test_terms.py"], COMPAT],
    "norms": [laws_of("sgld", "sghmc")],
    "samplers.momentum": [laws_of("sghmc", "sgnht", "baoa")],
    "samplers.sghmc": [laws_of("sghmc")],
    "samplers.sgnht": [laws_of("sgnht")],
    "pieces": [["tests/test_pieces.py"]],
    "samplers.splitting": [laws_of("baoa", "badoda")],
    "samplers.baoa": [laws_of("baoa")],
    "samplers.badoda": [laws_of("badoda"), ["tests/test_samplers.py", "-k", "badoda"]],
    "samplers.sglrw": [laws_of("sglrw")],
    "samplers.contour_sgld": [laws_of("contour_sgld"), ["tests/test_contour.py"]],
    "preconditioners": [laws_of("rmsprop_sgld", "sgld"), [LAWS, "-k", "preconditioner_obeys"]],
    "schedules": [laws_of("sgld", "cyclical_sgld"), ["tests/test_schedules.py"]],
    "tree": [laws_of("sgld", "badoda"), ["tests/test_tree.py"], ["tests/test_masks.py"]],
    "random": [["tests/test_sampled.py", "-k", "calibrated"], ["tests/test_random.py"]],
    "stepping": [["tests/test_sampled.py", "-k", "calibrated"], ["tests/test_kernel.py"]],
    "runs.request": [
        ["tests/test_sampling.py", "-k", "purpose or keys or company or independent"],
        ["tests/test_sampling.py"],
    ],
}


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Compiles the module with the change."""

    mutant: Mutant

    def get_code(self, fullname: str) -> CodeType:
        """The changed module's code; caches are left alone."""
        return compile(self.mutant.applied(Path(self.path).read_text()), self.path, "exec")


class MutantFinder:
    """Finds the mutated module before any other finder does."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module's spec, with a loader that changes it; None for other modules."""
        if name != f"funcsgmcmc.{self.mutant.module}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = MutantLoader(name, spec.origin)
        spec.loader.mutant = self.mutant
        return spec


class FirstFailure:
    """Remembers which test failed first."""

    found: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test failed."""
        if report.failed and self.found is None:
            self.found = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """A file of tests could not be imported."""
        if report.failed and self.found is None:
            self.found = f"import of {report.nodeid}"


def run(mutant: Mutant | None, tests: list[list[str]], result: Any) -> None:
    """In a process of its own: put the name of the test that noticed, or None.

    Without a mutant, as a control, the first round is enough.
    """
    if not DEBUG:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if mutant is not None:
        sys.meta_path.insert(0, MutantFinder(mutant))
    from funcsgmcmc.testing import PROFILES

    # Ten problems a law show most mistakes; a counterexample will do as it is.
    thorough = hypothesis.settings(PROFILES["default"], phases=[Phase.generate])
    rounds = [(PROFILES["quick"], tests[:1]), (thorough, tests)]
    if mutant is None:
        rounds = rounds[:1]
    for profile, arguments in ((profile, each) for profile, round_ in rounds for each in round_):
        PROFILES["default"] = profile
        noticed = FirstFailure()
        # Plain assertions: what is imported already cannot be rewritten.
        quiet = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain", "-m", "not slow"]
        status = pytest.main([*quiet, *arguments], plugins=[noticed])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, INTERRUPTED):
            raise RuntimeError(f"pytest ended with {status!r} for {arguments}")
        if noticed.found is not None:
            result.put(noticed.found)
            return
    result.put(None)


def killer(mutant: Mutant | None, module: str) -> str | None:
    """The test that notices a mutant, of those for its module; None if it survives."""
    context = multiprocessing.get_context("forkserver")
    result = context.Queue()
    process = context.Process(target=run, args=(mutant, TESTS[module], result))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return f"no end after {SECONDS} s"
    try:
        return result.get(timeout=1)
    except queue.Empty:
        return "no result; --debug shows why"


def page(killers: dict[Mutant, str | None]) -> str:
    """The page of the documentation."""
    killed = sum(test is not None for test in killers.values())
    equivalent = sum(bool(mutant.equivalent) for mutant in killers)
    kinds = Counter(mutant.error for mutant in killers)
    by_law = sum(test is not None and LAWS in test for test in killers.values())
    mistakes = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    lines = [
        "# Mutants",
        "",
        "`make mutants` breaks the update mathematics, one expression at a time, and runs tests",
        "until one fails. Expressions are found in the syntax, wherever their function stands; a",
        "single capital letter is any expression.",
        "",
        f"**{killed} of {len(killers)} mutants are killed**, {by_law} of",
        "them by the laws that any sampler is tried on (tests of `test_laws.py`);",
        f"{equivalent} makes no difference that a test could see.",
        f"The mistakes: {mistakes}.",
        "",
        "| where | expression | in its place | mistake | killed by |",
        "|---|---|---|---|---|",
    ]
    for mutant, test in killers.items():
        old, new = (text.replace("|", "\\|") for text in (mutant.old, mutant.new))
        survives = mutant.equivalent or "**survives**"
        name = survives if test is None else f"`{test.split('::')[-1]}`"
        where = f"`{mutant.module}` {mutant.where.removeprefix(mutant.module.split('.')[-1] + '.')}"
        lines.append(f"| {where} | `{old}` | `{new}` | {mutant.error} | {name} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all mutants, or those whose text holds a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose text holds this; writes no page")
    parser.add_argument("--debug", action="store_true", help="show what the tests print")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in str(mutant)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tensordict", "hypothesis", "scipy.stats", "pytest"])
    start = time.perf_counter()
    killers: dict[Mutant, str | None] = {}
    with ThreadPoolExecutor(options.workers) as pool:
        modules = sorted({mutant.module for mutant in chosen})
        for module, test in zip(modules, pool.map(partial(killer, None), modules), strict=True):
            if test is not None:
                sys.exit(f"without a mutant, the tests of {module} fail: {test}")
        found = pool.map(killer, chosen, [mutant.module for mutant in chosen])
        for mutant, test in zip(chosen, found, strict=True):
            killers[mutant] = test
            print(f"{'SURVIVES' if test is None else 'killed'}  {mutant}  {test or ''}", flush=True)
    survivors = sum(test is None and not mutant.equivalent for mutant, test in killers.items())
    unclear = sum(test is not None and "::" not in test for test in killers.values())
    print(
        f"{len(chosen)} mutants in {time.perf_counter() - start:.0f} s: {survivors} survive "
        f"unexplained, {unclear} end without a failing test"
    )
    if not options.only:
        PAGE.write_text(page(killers))
    sys.exit(survivors + unclear > 0)


if __name__ == "__main__":
    main()
