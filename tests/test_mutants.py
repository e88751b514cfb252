"""Mutants are anchored to syntax: a refactoring that keeps the mathematics keeps the list."""

import ast
import importlib
from pathlib import Path

import pytest

import funcsgmcmc

PACKAGE = Path(funcsgmcmc.__file__).parent


@pytest.fixture
def mutation(monkeypatch):
    """The modules `mutant` and `mutants`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "mutation"))
    return importlib.import_module("mutant"), importlib.import_module("mutants")


def test_every_mutant_changes_its_module(mutation):
    _, listed = mutation
    assert len(listed.MUTANTS) >= 175
    assert len({str(mutant) for mutant in listed.MUTANTS}) == len(listed.MUTANTS)
    for mutant in listed.MUTANTS:
        source = (PACKAGE / f"{mutant.module.replace('.', '/')}.py").read_text()
        changed = mutant.applied(source)
        assert ast.dump(changed) != ast.dump(ast.parse(source))
        # Neither formatting nor comments nor the rest of the file matter.
        assert ast.dump(mutant.applied(ast.unparse(ast.parse(source)))) == ast.dump(changed)
    assert sum(bool(mutant.equivalent) for mutant in listed.MUTANTS) <= 1


def test_a_wildcard_is_what_it_stands_for(mutation):
    found = mutation[0].Mutant("kick", "Term(X, Y).value()", "X", "constant")
    changed = found.applied("def kick(a):\n    return 2 * Term(a + 1, f(a)).value()")
    assert ast.unparse(changed) == "def kick(a):\n    return 2 * (a + 1)"
    same = mutation[0].Mutant("kick", "X - X", "X", "sign")
    assert ast.unparse(same.applied("def kick(a):\n    return (a - 1) - (a - a)")).endswith("- a")


def test_what_is_not_there_is_named(mutation):
    make = mutation[0].Mutant
    with pytest.raises(ValueError, match="kick has no 'lr / 3'"):
        make("kick", "lr / 3", "lr", "constant").applied("def kick(lr):\n    return lr / 2")
    with pytest.raises(ValueError, match=r"advance must name one definition, got \['samplers"):
        _ = make("advance", "self.lr", "1", "constant").module
    with pytest.raises(ValueError, match=r"nowhere must name one definition, got \[\]"):
        _ = make("nowhere", "self.lr", "1", "constant").module
