"""Losses of a training run by name, and weights of the flow's error."""

from dataclasses import dataclass

from anisodiff.registry import Entry


@dataclass(frozen=True)
class Loss(Entry):
    """A loss of a network over a path, one value an image.

    Attributes:
        source: the function (`objectives/losses.py`).
        learns_path: it trains the path too.
        learns_network: it trains the network.
    """

    learns_path: bool = False
    learns_network: bool = True


LOSSES = {
    "tlsm": Loss("objectives.losses:tlsm_loss", learns_path=True),
    "edm": Loss("objectives.losses:edm_loss"),
    "discretisation": Loss("objectives.losses:warp_loss", learns_path=True, learns_network=False),
}
WEIGHTS = {  # the function takes variances with their rates, and the constant c
    "tlsm": Entry("objectives.losses:tlsm_weight"),
    "elbo": Entry("objectives.losses:elbo_weight"),
    "simple": Entry("objectives.losses:simple_weight"),
}
