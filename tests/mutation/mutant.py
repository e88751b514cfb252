"""A mutant: in the package's syntax, an expression that fits a pattern gives way to another.

A mutant is anchored to what the code says, not to where it stands or how it is written. The
function is named without its module, so that it may move; a single capital letter in the pattern
stands for any expression, so that what is local may be renamed; formatting and comments do not
matter. A refactoring that keeps the mathematics keeps the list, or breaks it with an error that
names the mutant.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "funcsgmcmc"

Bindings = dict[str, ast.expr]


@dataclass(frozen=True)
class Mutant:
    """A change of one expression.

    Attributes:
        where: The end of the qualified name of a function or class, as much of it as makes it the
            only one: `kick`, `SGLD.advance`, `tree.dot`.
        old: The pattern; the first expression there that fits it is changed.
        new: What stands in its place; a wildcard of `old` is what it stood for.
        error: What kind of mistake it is.
        equivalent: Why it is none after all, and no test can notice; empty if one must.
    """

    where: str
    old: str
    new: str
    error: str
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.old} → {self.new}"

    @property
    def module(self) -> str:
        """The module that holds the function, below `funcsgmcmc`.

        Raises:
            ValueError: No module does, or several.
        """
        found = [module for module, name in _definitions() if _names(module, name, self.where)]
        if len(found) != 1:
            raise ValueError(f"{self.where} must name one definition, got {found}")
        return found[0]

    def applied(self, source: str) -> ast.Module:
        """The tree of the module with the change.

        Raises:
            ValueError: The function has no expression that fits.
        """
        module, name = ast.parse(source), self.module
        scope = next(node for each, node in _walk(module) if _names(name, each, self.where))
        replacement = _Replacement(_expression(self.old), _expression(self.new))
        replacement.visit(scope)
        if not replacement.done:
            raise ValueError(f"{self.where} has no {self.old!r}")
        return ast.fix_missing_locations(module)


def source_of(module: str) -> str:
    """The text of a module below `funcsgmcmc`."""
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


def _names(module: str, name: str, where: str) -> bool:
    return f".{module}.{name}".endswith(f".{where}")


@functools.cache
def _definitions() -> list[tuple[str, str]]:
    """Modules with the qualified names of the definitions in them, but `testing` and `compat`."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not module.startswith(("testing", "compat")):
            names = dict(_walk(ast.parse(path.read_text())))  # overloads share a name
            found += [(module, name) for name in names]
    return found


def _walk(scope: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Definitions by their qualified names, the last of several overloads first."""
    for node in reversed(getattr(scope, "body", [])):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            yield from _walk(node, f"{prefix}{node.name}.")


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def _is_wildcard(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and len(node.id) == 1 and node.id.isupper()


def _fits(pattern: object, node: object, bindings: Bindings) -> bool:
    """Whether a syntax tree fits a pattern; wildcards are bound to what they stand for."""
    if isinstance(pattern, ast.Name) and _is_wildcard(pattern) and isinstance(node, ast.expr):
        bound = bindings.setdefault(pattern.id, node)
        return ast.dump(bound) == ast.dump(node)
    if isinstance(pattern, list) and isinstance(node, list):
        pairs = zip(pattern, node, strict=False)
        return len(pattern) == len(node) and all(_fits(*pair, bindings) for pair in pairs)
    if isinstance(pattern, ast.AST) and isinstance(node, ast.AST):
        return type(pattern) is type(node) and all(
            _fits(getattr(pattern, field), getattr(node, field), bindings)
            for field in pattern._fields
            if field != "ctx"
        )
    return pattern == node


class _Replacement(ast.NodeTransformer):
    """Puts one expression in the place of the first that fits a pattern."""

    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new, self.done = old, new, False

    def visit(self, node: ast.AST) -> ast.AST:
        bindings: Bindings = {}
        if not self.done and isinstance(node, ast.expr) and _fits(self.old, node, bindings):
            self.done = True
            return _Substitution(bindings).visit(self.new)
        return self.generic_visit(node)


class _Substitution(ast.NodeTransformer):
    """Puts what wildcards stand for in their places."""

    def __init__(self, bindings: Bindings) -> None:
        self.bindings = bindings

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.bindings.get(node.id, node)
