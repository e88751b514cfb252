"""What a run writes down as it goes.

Losses, metrics and observables are small and kept whole; draws are as large as the parameters and
kept only if asked for. All records live on the CPU, except the losses of the run in progress, which
stay on its device so that no step waits for a copy.
"""

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.kernel import Info
from funcsgmcmc.metrics import Metrics

Observable = Callable[[TensorDict], Tensor]
Chunk = int | slice


class Recorder:
    """Records of C chains.

    Attributes:
        draw_steps: The steps that make draws, `[D]`; the last one ends the run.
        num_steps: Steps of the whole run.
        steps_done: Steps that all chains have made.
    """

    def __init__(
        self,
        num_chains: int,
        *,
        draw_steps: Tensor,
        observables: Mapping[str, Observable],
        save_draws: bool,
        loss_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.draw_steps = draw_steps
        self.num_steps = int(draw_steps[-1]) + 1
        self.steps_done = 0
        self._num_chains = num_chains
        self._draw_at = {step: draw for draw, step in enumerate(draw_steps.tolist())}
        self._losses = torch.full(
            (num_chains, self.num_steps), torch.nan, dtype=loss_dtype, device=device
        )
        self._metrics: list[Tensor] = []
        self._log_weights: Tensor | None = None
        self._functions = dict(observables)
        self._observables: dict[str, Tensor] = {}
        self._save_draws = save_draws
        self._draws: dict[tree.Name, Tensor] = {}

    def step(self, chunk: Chunk, info: Info) -> None:
        """Write what a step of some chains reported."""
        self._losses[chunk, self.steps_done] = info.loss
        for row, value in enumerate(info.metrics):
            if row == len(self._metrics):
                shape = (self._num_chains, self.num_steps)
                self._metrics.append(torch.zeros(shape, dtype=value.dtype, device=value.device))
            self._metrics[row][chunk, self.steps_done] = value
        draw = self._draw_at.get(self.steps_done)
        if draw is not None and isinstance(info.log_weight, Tensor):
            if self._log_weights is None:
                shape = (self._num_chains, len(self.draw_steps))
                self._log_weights = torch.zeros(shape, dtype=info.log_weight.dtype)
            self._log_weights[chunk, draw] = info.log_weight.cpu()

    def draw(self, chunk: Chunk, params: TensorDict) -> None:
        """Write a draw of some chains, if this step makes one."""
        draw = self._draw_at.get(self.steps_done)
        if draw is None:
            return
        for name, function in self._functions.items():
            value = function(params) if isinstance(chunk, int) else torch.vmap(function)(params)
            checks.observable(name, value)
            self._put(self._observables, name, chunk, draw, value)
        if self._save_draws:
            for key, leaf in tree.leaves(params):
                self._put(self._draws, key, chunk, draw, leaf)

    def _put(self, into: dict, name: tree.Name, chunk: Chunk, draw: int, value: Tensor) -> None:
        if name not in into:
            shape = value.shape if isinstance(chunk, int) else value.shape[1:]
            rows = (self._num_chains, len(self.draw_steps))
            into[name] = torch.empty((*rows, *shape), dtype=value.dtype)
        into[name][chunk, draw] = value.to(into[name].device)

    @property
    def mean_loss(self) -> float:
        """Mean of the last step's losses over healthy chains."""
        return float(self._losses[:, max(0, self.steps_done - 1)].nanmean())

    def losses(self) -> Tensor:
        """Losses of the steps done, `[C, T]`."""
        return self._losses[:, : self.steps_done].cpu()

    def metrics(self) -> Metrics | None:
        """Metrics of the steps done, each `[C, T]`."""
        if not self._metrics:
            return None
        return Metrics(*(value[:, : self.steps_done].cpu() for value in self._metrics))

    def observables(self) -> dict[str, Tensor]:
        """Observables of the draws made, each `[C, D, …]`."""
        return {name: value[:, : self.draws_done] for name, value in self._observables.items()}

    def draws(self) -> TensorDict | None:
        """Parameters of the draws made, leaves `[C, D, *shape]`."""
        if not self._draws:
            return None
        shape = torch.Size((self._num_chains, self.draws_done))
        return tree.build({k: leaf[:, : self.draws_done] for k, leaf in self._draws.items()}, shape)

    def log_weights(self) -> Tensor | None:
        """Log weights of the draws made, `[C, D]`."""
        return None if self._log_weights is None else self._log_weights[:, : self.draws_done]

    @property
    def draws_done(self) -> int:
        """Number of draws made."""
        return int((self.draw_steps < self.steps_done).sum())
