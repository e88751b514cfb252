"""What a run tells while it goes: its status to a display, and draws to the user's function."""

from typing import TYPE_CHECKING

from torch import Tensor

from funcsgmcmc.runs.mixing import Mixing
from funcsgmcmc.runs.progress import Progress
from funcsgmcmc.runs.record import Draw
from funcsgmcmc.runs.rows import gather

if TYPE_CHECKING:
    from funcsgmcmc.runs.run import Run


class Reporter:
    """Tells of the steps of a run.

    Args:
        run: The run.
        progress: Where its progress is shown.
    """

    def __init__(self, run: "Run", progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._mixing = Mixing()

    def steps_done(self, number: int) -> None:
        """Tell of the last steps, so many as were made at once."""
        if self._progress.is_shown:
            done = self._run.clock.steps_done
            for row in range(done - number, done):
                self._look_at_mixing(row)
            self._progress.steps_done(self._status, number)
        if self._run.request.on_draw is not None:
            self._hand_over_draw()

    def _look_at_mixing(self, row: int) -> None:
        """Take a step into what is told of mixing, if it is one after burn-in."""
        since = row - self._run.clock.num_burnin_steps
        if since >= 0 and self._mixing.is_due(since):
            losses, distances = self._run.recorder.at_step(row)
            self._mixing.add({"loss": losses, "distance": distances})

    def _status(self) -> str:
        """The text beside the progress."""
        losses, _ = self._run.recorder.at_step(self._run.clock.steps_done - 1)
        healthy = self._healthy()
        health = f"{int(healthy.sum())}/{len(healthy)} chains healthy"
        text = f"loss {float(losses.nanmean()):.4g}, {health}"
        if found := self._mixing.r_hats(healthy):
            r_hats = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            text += f", R-hat so far: {r_hats}"
        return text

    def _healthy(self) -> Tensor:
        """Which chains are not frozen, bool `[C]`."""
        return gather([chunk.frozen_at for chunk in self._run.chunks]).cpu() < 0

    def _hand_over_draw(self) -> None:
        """Give the user's function the draw of the last steps, if they made one."""
        run, clock = self._run, self._run.clock
        drawn = [chunk.drawn for chunk in run.chunks if chunk.drawn is not None]
        if run.request.on_draw is None or not drawn:
            return
        index = clock.draws_done - 1
        step = int(clock.draw_steps[index])
        losses, distances = run.recorder.at_step(step - clock.first_step)
        params, observed = zip(*drawn, strict=True)
        draw = Draw(
            index=index,
            step=step,
            losses=losses,
            distances=distances,
            observables={name: gather([each[name] for each in observed]) for name in observed[0]},
            params=gather(list(params)),
            healthy=self._healthy(),
        )
        try:
            run.request.on_draw(draw)
        except Exception as error:
            error.add_note(f"This happened when on_draw was called with draw {draw.index}.")
            raise
