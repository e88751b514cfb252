"""Norms and inner products of the terms of an update."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.terms import Term, Terms, sum_terms
from funcsgmcmc.tree import Scalar

# The measured terms, and the pairs of these whose inner products make the metrics. The sum of both
# pulls stands for itself: it takes two products fewer, and nothing cancels between products.
_GRAD, _UNSCALED, _LOCALIZATION, _DECAY, _NOISE, _DISTANCE, _PRIOR = range(7)
_SMALL = 16_384  # entries
_PAIRS = (
    # The sum of pulls has no norm among the metrics: `prior` adds squares.
    *((i, i) for i in range(6)),
    (_GRAD, _PRIOR),
    (_GRAD, _NOISE),
    (_PRIOR, _NOISE),
)


class Metrics(NamedTuple):
    """L2 norms and inner products of one step's terms, each `[*chains]`.

    Sums over parameters are taken in float32 or better.

    Norms are of the terms as applied (step size, preconditioner and mask included), except
    `unscaled_grad`, without preconditioner and mask, and `distance` = ‖w − w₀‖ before the update.
    A cosine similarity is `dot / (norm_a * norm_b)`.

    Attributes:
        scaled_grad: ‖scaled_grad‖.
        unscaled_grad: ‖unscaled_grad‖.
        localization: ‖localization‖, a user's log-prior included.
        weight_decay: ‖weight_decay‖.
        noise: ‖noise‖.
        distance: ‖w − w₀‖.
        dot_grad_prior: ⟨scaled_grad, localization + weight_decay⟩.
        dot_grad_noise: ⟨scaled_grad, noise⟩.
        dot_prior_noise: ⟨localization + weight_decay, noise⟩.
        numel: Number of parameters whose mask is not zero, int64.
    """

    scaled_grad: Tensor
    unscaled_grad: Tensor
    localization: Tensor
    weight_decay: Tensor
    noise: Tensor
    distance: Tensor
    dot_grad_prior: Tensor
    dot_grad_noise: Tensor
    dot_prior_noise: Tensor
    numel: Tensor

    @property
    def prior(self) -> Tensor:
        """√(‖localization‖² + ‖weight_decay‖²)."""
        return torch.hypot(self.localization, self.weight_decay)


def metrics(terms: Terms, mask: TensorDict | None = None) -> Metrics:
    """Compute the metrics of a step.

    Args:
        terms: The step's terms, of batch size `[*chains]`.
        mask: The sampler's mask, of batch size `[]` or `[*chains]`; None means 1.

    Returns:
        Metrics, each entry `[*chains]`.
    """
    checks.instance("terms", terms, Terms)
    measured = _measured(terms)
    # Directions are multiplied, and coefficients afterwards: terms share directions.
    directions, places = _distinct(measured)
    pairs = _pairs(places)
    products = tree.dots([(directions[i], directions[j]) for i, j in pairs])
    dots = dict(zip(pairs, products, strict=True))
    # The noise has the batch size of the step, which a shared mask lacks.
    numel = tree.count(terms.noise.direction, mask)
    values = [dots[places[a], places[b]] for a, b in _PAIRS]
    return _from_products(_coefficients(measured), values, numel)


class PartialMetrics:
    """Metrics of a step that is made part by part, as an optimizer makes it.

    Each part is a bare tensor; inner products of the parts' directions add up. Small parts wait to
    be multiplied together: a network has many, and each would cost as much as a large one.
    """

    def __init__(self) -> None:
        self._coefficients: list[Scalar | None] = [None] * 7
        # Numbers, to which numbers and tensors of any device add.
        self._values: list[Scalar] = [0.0] * len(_PAIRS)
        self._waiting: dict[tuple[int, ...], list[Tensor]] = {}
        self._entries_waiting = 0

    def add(self, terms: Terms) -> None:
        """Take in the terms of one part; the coefficients must be those of the other parts."""
        measured = _measured(terms)
        self._coefficients = _coefficients(measured)
        directions, places = _distinct(measured)
        entries = directions[0].numel()
        if entries > _SMALL or not directions[0].is_cpu:
            flat = tree.flat(directions)
            dots = {(i, j): torch.dot(flat[i], flat[j]) for i, j in _pairs(places)}
            # On the CPU numbers cost less than tensors; elsewhere, reading one would wait for it.
            self._add(places, {k: dot.item() if dot.is_cpu else dot for k, dot in dots.items()})
            return
        # A copy: the optimizer writes to its tensors before they are multiplied.
        rows = torch.stack(directions).reshape(len(directions), -1)
        self._waiting.setdefault(places, []).append(tree.widened(rows))
        self._entries_waiting += entries
        # Bounds the memory of the copies.
        if self._entries_waiting > 4 * _SMALL:
            self._multiply_waiting()

    def values(self) -> list[Scalar]:
        """Sums of inner products of the parts' directions, which add up over processes too."""
        self._multiply_waiting()
        return self._values

    def set_values(self, values: list[Scalar]) -> None:
        """Replace these sums, by those over all processes."""
        self._values = values

    def absorb(self, other: "PartialMetrics") -> None:
        """Take in the parts of another, of the same step."""
        if not any(each is not None for each in self._coefficients):
            self._coefficients = other._coefficients
        pairs = zip(self.values(), other.values(), strict=True)
        self._values = [float(one) + float(two) for one, two in pairs]

    def metrics(self, numel: int) -> Metrics:
        """The metrics of all parts together: numbers, or tensors on other devices than the CPU.

        Args:
            numel: Number of parameters whose mask is not zero.
        """
        self._multiply_waiting()
        return _from_products(self._coefficients, self._values, numel)

    def _multiply_waiting(self) -> None:
        for places, parts in self._waiting.items():
            rows = torch.cat(parts, 1)
            # With `out`, autocast leaves the product in the dtype of the rows.
            gram = torch.mm(rows, rows.T, out=rows.new_empty(len(rows), len(rows)))
            entries = gram.tolist()
            self._add(places, {(i, j): entries[i][j] for i, j in _pairs(places)})
        self._waiting, self._entries_waiting = {}, 0

    def _add(self, places: tuple[int, ...], dots: dict[tuple[int, int], Scalar]) -> None:
        for index, (a, b) in enumerate(_PAIRS):
            self._values[index] += dots[places[a], places[b]]


def _pairs(places: tuple[int, ...]) -> list[tuple[int, int]]:
    """The pairs of directions to multiply."""
    # A set: terms with one direction share their products.
    return sorted({(places[a], places[b]) for a, b in _PAIRS})


def _measured(terms: Terms) -> list[Term | None]:
    """The terms whose products the metrics need; the sum of both pulls is the last."""
    pulls = [term for term in (terms.localization, terms.weight_decay) if term is not None]
    return [
        terms.scaled_grad,
        terms.unscaled_grad,
        terms.localization,
        terms.weight_decay,
        terms.noise,
        terms.distance,
        sum_terms(pulls),
    ]


def _coefficients(terms: Sequence[Term | None]) -> list[Scalar | None]:
    """The terms' coefficients; None for an absent term."""
    return [None if term is None else term.coefficient for term in terms]


def _distinct(terms: Sequence[Term | None]) -> tuple[list[Any], tuple[int, ...]]:
    """The terms' directions without repetition, and the place of each term's direction.

    Without preconditioner, mask and log-prior several terms share one direction. An absent term is
    given the first place, whose products its coefficient None leaves out.
    """
    directions: list[Any] = []
    places: list[int] = []
    for term in terms:
        place = 0
        if term is not None:
            direction = term.direction
            for place, other in enumerate(directions):  # noqa: B007
                # The same object, not an equal one: comparing entries would cost a product.
                if other is direction:
                    break
            else:
                place = len(directions)
                directions.append(direction)
        places.append(place)
    return directions, tuple(places)


def _from_products(coefficients: Sequence[Any], values: Sequence[Any], numel: Any) -> Metrics:
    """Norms and inner products of terms from those of their directions.

    Args:
        coefficients: Of the terms and of the sum of pulls; None for an absent term.
        values: One for each of `_PAIRS`: `[*chains]` each, or numbers, if the coefficients are.
        numel: As in `Metrics`.
    """
    product = dict(zip(_PAIRS, values, strict=True))

    def dot(a: int, b: int) -> Any:
        left, right = coefficients[a], coefficients[b]
        return 0.0 if left is None or right is None else left * right * product[a, b]

    def norm(a: int) -> Any:
        coefficient = coefficients[a]
        # Contour SGLD multiplies its drift by factors that may be negative.
        return 0.0 if coefficient is None else abs(coefficient) * product[a, a] ** 0.5

    return Metrics(
        scaled_grad=norm(_GRAD),
        unscaled_grad=norm(_UNSCALED),
        localization=norm(_LOCALIZATION),
        weight_decay=norm(_DECAY),
        noise=norm(_NOISE),
        distance=norm(_DISTANCE),
        dot_grad_prior=dot(_GRAD, _PRIOR),
        dot_grad_noise=dot(_GRAD, _NOISE),
        dot_prior_noise=dot(_PRIOR, _NOISE),
        numel=numel,
    )
