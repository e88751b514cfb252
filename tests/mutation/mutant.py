"""A mutant: in a function, one expression gives way to another."""

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A change of one expression.

    Attributes:
        module: Below `funcsgmcmc`.
        where: Qualified name of the function or class.
        old: The expression; its first occurrence there is changed.
        new: What stands in its place.
        error: What kind of mistake it is.
        equivalent: Why it is none after all, and no test can notice; empty if one must.
    """

    module: str
    where: str
    old: str
    new: str
    error: str
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.where}: {self.old} → {self.new}"

    def applied(self, source: str) -> ast.Module:
        """The module's tree with the change.

        Raises:
            ValueError: The function has no such expression, or there is no such function.
        """
        module = ast.parse(source)
        scope: ast.AST = module
        for name in self.where.split("."):
            scope = _definition(scope, name)
        replacement = _Replacement(_expression(self.old), _expression(self.new))
        replacement.visit(scope)
        if not replacement.done:
            raise ValueError(f"{self.module}.{self.where} has no {self.old!r}")
        return ast.fix_missing_locations(module)


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def _definition(scope: ast.AST, name: str) -> ast.AST:
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = getattr(scope, "body", [])
    found = [node for node in body if isinstance(node, kinds) and node.name == name]
    if not found:
        raise ValueError(f"there is no {name} to change")
    return found[-1]  # overloads come before


class _Replacement(ast.NodeTransformer):
    """Puts one expression in the place of the first that equals another."""

    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new, self.done = ast.dump(old), new, False

    def visit(self, node: ast.AST) -> ast.AST:
        if not self.done and isinstance(node, ast.expr) and ast.dump(node) == self.old:
            self.done = True
            return self.new
        return self.generic_visit(node)
