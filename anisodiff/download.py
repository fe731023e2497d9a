"""Published files: fetched, hashed, and put in place in one move."""

import shutil
from pathlib import Path

from anisodiff.files import StageError, atomic
from anisodiff.files import sha256 as digest_of


def fetch(url: str, sha256: str, output: Path) -> None:
    """Copy or download a file, and refuse it if its hash differs.

    Args:
        url: https address, or a path on this machine.
        sha256: hex digest the file must have.
        output: where it is put.

    Raises:
        StageError: it cannot be had, or its hash differs.
    """
    with atomic(output) as temporary:
        if url.startswith(("http://", "https://")):
            import pooch

            try:
                pooch.HTTPDownloader(progressbar=True)(url, str(temporary), None)
            except OSError as error:  # requests' errors are OSErrors
                raise StageError(f"{url}: cannot be downloaded ({error}): check the address and the network") from error
        elif Path(url).is_file():
            shutil.copyfile(url, temporary)
        else:
            raise StageError(f"{url}: no such file: mend the url in the configuration")
        found = digest_of(temporary)
        if found != sha256:
            raise StageError(
                f"{url}: sha256 is {found}, not {sha256}: the file is corrupt or another one; "
                f"fetch it again, or set the hash if you trust it"
            )
