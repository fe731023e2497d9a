"""Networks by name: subclasses of `RawNetwork` (`networks/unets.py`)."""

from anisodiff.registry import Entry

NETWORKS = {
    "SongUNet": Entry("networks.unets:SongUNet"),
    "DhariwalUNet": Entry("networks.unets:DhariwalUNet"),
}
