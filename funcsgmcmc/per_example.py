"""Losses of single examples, or of single tokens, at the draws of a run.

Shapes: n examples, in pieces of b; T tokens an example; V words; C chains, whose values come first.

A per-example loss is a function `(params, batch) -> [b]`, or `-> [b, tokens]`. `module_loss` makes
one of a criterion that does not average (`reduction="none"`, or `next_token_losses`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, tree
from funcsgmcmc.batches import check_batch_size, check_examples, map_examples, pieces_of, plain

PerExampleLoss = Callable[[TensorDict, Any], Tensor]

# Hugging Face's models leave targets of this value out of their loss.
_IGNORED = -100


def losses_on(
    per_example_loss: PerExampleLoss,
    data: Any,
    *,
    batch_size: int | None = None,
    mask: Tensor | None = None,
) -> "LossesOn":
    """Make an observable of a run: the loss of every example, or of every token, of some data.

    `sample(…, observables={"train": losses_on(…), "test": losses_on(…)})` records them at each
    draw. The data is evaluated in pieces, so that a run holds the activations and the logits of
    one piece (of the chains of a chunk) at a time.

    Args:
        per_example_loss: `(params, batch) -> [b]`, the loss of each example, or `[b, tokens]`. For
            instance `module_loss(model, partial(cross_entropy, reduction="none"))`, or
            `module_loss(model, next_token_losses)` for language models.
        data: Tensors `[n, …]` in the structure of a batch.
        batch_size: Examples in a piece, b (default: all n).
        mask: Which tokens count, bool `[n, tokens]`, or which examples, `[n]` (default: all).

    Returns:
        A function of the parameters of one chain: the losses, `[n]` or `[n, tokens]`, in float32;
        NaN for those that the mask leaves out, which estimates leave out too. At the anchor,
        `losses(samples.sampler.anchor)` gives ℓ(w₀).

    Raises:
        TypeError: The loss is no function, the data or the mask no tensors.
        ValueError: Tensors differ in length, or `batch_size` is not in [1, n]. When called, if the
            loss does not return one value for each example.
    """
    checks.function("per_example_loss", per_example_loss)
    number = check_examples(pytree.tree_leaves(plain(data)))
    size = check_batch_size(batch_size, number)
    if mask is not None:
        checks.instance("mask", mask, Tensor)
        if mask.dtype != torch.bool or mask.is_meta:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype} on {mask.device}")
        if mask.ndim not in (1, 2) or len(mask) != number:
            raise ValueError(
                f"mask must have shape ({number},) or ({number}, tokens), got {tuple(mask.shape)}"
            )
    return LossesOn(per_example_loss, plain(data), number, size, mask)


class LossesOn:
    """The losses of some data, a function of one chain's parameters; see `losses_on`.

    Attributes:
        num_examples: n.
    """

    def __init__(
        self,
        per_example_loss: PerExampleLoss,
        data: Any,
        num_examples: int,
        batch_size: int,
        mask: Tensor | None,
    ) -> None:
        self._loss, self._data, self._mask = per_example_loss, data, mask
        self._batch_size = batch_size
        self.num_examples = num_examples

    def __call__(self, params: TensorDict) -> Tensor:
        """ℓ(w), `[n]` or `[n, tokens]`."""
        device = tree.device(params)
        parts = []
        with torch.no_grad():
            for piece, size in pieces_of(self._data, self.num_examples, self._batch_size):
                batch = map_examples(lambda leaf: leaf.to(device), piece)
                parts.append(_checked(self._loss(params, batch), size).float())
        losses = torch.cat(parts)
        if self._mask is None:
            return losses
        if self._mask.shape != losses.shape[: self._mask.ndim]:
            raise ValueError(
                f"mask must have the losses' shape {tuple(losses.shape)}, "
                f"got {tuple(self._mask.shape)}"
            )
        kept = self._mask.to(device)
        return losses.where(kept if kept.ndim == losses.ndim else kept[:, None], torch.nan)


def _checked(losses: Any, size: int) -> Tensor:
    """Losses of a piece of some examples.

    Raises:
        TypeError: They are no real tensor.
        ValueError: They are not one, or one for each token, for each example.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"per_example_loss must return a real tensor, got {kind}")
    if losses.ndim not in (1, 2) or len(losses) != size:
        raise ValueError(
            f"per_example_loss must return one loss for each of {size} examples, or one for each "
            f"of their tokens, got shape {tuple(losses.shape)}: do not average "
            "(reduction='none')"
        )
    return losses


def next_token_losses(output: Any, batch: Any) -> Tensor:
    """The loss of every token of a batch, given those before it: a criterion of `module_loss`.

        ℓ_{i,t} = −log softmax(logits_{i,t})[x_{i,t+1}],   t = 0, …, T − 2

    Args:
        output: Logits `[b, T, V]`, or an output of a model that has them as `.logits`.
        batch: Tokens `[b, T]`; or a dict with `input_ids`, and perhaps `attention_mask`, 0 at
            padding, and `labels`, the tokens to predict, −100 where none is.

    Returns:
        `[b, T − 1]`, in float32 or better; NaN where there is nothing to predict.

    Raises:
        TypeError: There are no logits, or no tokens.
    """
    losses, kept = _token_losses(output, batch)
    return losses.where(kept, torch.nan)


def next_token_loss(output: Any, batch: Any) -> Tensor:
    """The mean of `next_token_losses` over all tokens to predict: a criterion to sample with.

    Args:
        output: As for `next_token_losses`.
        batch: As for `next_token_losses`.

    Returns:
        A scalar.
    """
    losses, kept = _token_losses(output, batch)
    return losses.where(kept, 0.0).sum() / kept.sum()


def _token_losses(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Losses of tokens, and which of them there are to predict, both `[b, T − 1]`."""
    logits = _logits_of(output)
    given: dict[str, Any] = {"input_ids": batch}
    if isinstance(batch, Mapping | TensorDictBase):
        given = dict(batch.items())
    tokens = given.get("labels", given.get("input_ids"))
    if not isinstance(tokens, Tensor):
        raise TypeError(
            "a batch of tokens must be a tensor, or a dict with input_ids, got "
            f"{type(batch).__name__}"
        )
    targets = tokens[..., 1:]
    kept = targets != _IGNORED
    if (attended := given.get("attention_mask")) is not None:
        # Padding on the left predicts nothing, padding on the right is not predicted.
        kept = kept & (attended[..., 1:] != 0) & (attended[..., :-1] != 0)
    before = tree.widened(logits[..., :-1, :])
    chosen = before.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    # No log-softmax: that would be a second tensor of the logits' size to keep.
    return before.logsumexp(-1) - chosen, kept


def _logits_of(output: Any) -> Tensor:
    """The logits in the output of a model.

    Raises:
        TypeError: There are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits, or an output with .logits, got {type(output).__name__}"
        )
    return logits
