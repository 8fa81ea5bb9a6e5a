"""How many steps are taken between two looks at what else there is, a stop above all."""

from __future__ import annotations

CALL_SECONDS = 1.0


class Stride:
    """How many steps the next call takes: so many as take `CALL_SECONDS`, or fewer.

    The first takes one, as nobody knows yet how long that is. What comes out of a run does not
    depend on it: see `loop.train`.

    Args:
        most: steps of a call.

    Attributes:
        steps: of the next call. Several workers, of which each has its own clock, have to take the
            same steps together: those of the chief's.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.steps = 1

    def took(self, steps: int, seconds: float) -> None:
        """Learns how long so many steps took."""
        in_time = steps * CALL_SECONDS / max(seconds, 1e-9)
        self.steps = int(min(self._most, max(1, in_time)))
