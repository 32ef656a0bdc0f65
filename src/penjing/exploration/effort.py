"""The effort of a study: limits of seconds, candidates, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from penjing import units
from penjing.errors import PenjingError


@dataclass(frozen=True)
class Phase:
    """End of a phase of the search, as shares of the seconds and of the trials."""

    time: float
    trials: float


@dataclass(frozen=True)
class Effort:
    """Limits of a study's total seconds and trials, over all its runs; infinite for no limit."""

    seconds: float
    trials: float

    @classmethod
    def of(cls, time: str | float | None, trials: int | None) -> Effort:
        """Make the limits that a user asked for; half an hour if there are none.

        Raises:
            PenjingError: a limit is not a positive number.
        """
        if trials is not None and trials < 1:
            raise PenjingError(f"trials must be a positive number, found {trials}.")
        if time is None:
            time = 1800.0 if trials is None else math.inf
        seconds = time if time == math.inf else units.parsed(time, units.SECONDS, "time")
        return cls(float(seconds), math.inf if trials is None else trials)

    @property
    def timed(self) -> bool:
        """Whether seconds are limited; if not, no decision depends on a clock."""
        return self.seconds < math.inf

    def share(self, elapsed_s: float, tried: int) -> float:
        """Return the share of the effort that is used up, in [0, 1]."""
        return min(max(elapsed_s / self.seconds, tried / self.trials), 1.0)

    def allows(self, phase: Phase, elapsed_s: float, tried: int) -> bool:
        return elapsed_s < self.seconds * phase.time and tried < self.trials * phase.trials
