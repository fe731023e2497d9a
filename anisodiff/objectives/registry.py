"""Losses of a training run by name."""

from dataclasses import dataclass

from anisodiff.registry import Entry


@dataclass(frozen=True)
class Loss(Entry):
    """A loss of a network over a path, one value an image.

    Attributes:
        source: the function (`objectives/losses.py`).
        learns_path: it trains the path too.
    """

    learns_path: bool = False


LOSSES = {
    "tlsm": Loss("objectives.losses:tlsm_loss", learns_path=True),
    "edm": Loss("objectives.losses:edm_loss"),
}
