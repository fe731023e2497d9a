"""Settings of files that are fetched, and of feature networks."""

from typing import Annotated

from anisodiff.experiment.settings.base import Md5, OneOf, Section, Seen, Sha256, key
from anisodiff.metrics.registry import FEATURES

SHA256 = (
    "Hex digest; another file is refused. Without one, the first that is seen is written to config/lock.json and holds "
    "from then on."
)
MD5 = "Hex digest, where only that is published."
URL = (
    "An https or file address, a path from the repository's root, or package://module/file, a file of an installed "
    "Python package. A .pkl is one of EDM's pickles, whatever follows a ? in its address."
)


class FileSettings(Section):
    """A published or committed file."""

    url: Seen = key(URL)
    sha256: Sha256 | None = key(SHA256, None)
    md5: Md5 | None = key(MD5, None)

    @property
    def hashes(self) -> dict[str, str | None]:
        return {"sha256": self.sha256, "md5": self.md5}


class FeaturesSettings(FileSettings):
    """Feature network of the distance."""

    kind: Annotated[str, OneOf(FEATURES)] = key(
        "inception (FID), dinov2-vit-l14 (FD-DINOv2), efficientnet-lite0, or digits-cnn."
    )
