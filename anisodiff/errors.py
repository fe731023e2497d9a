"""What a user did wrong, in one line, and a stop on request."""

from collections.abc import Iterator
from contextlib import contextmanager


class InvalidArgument(ValueError):
    """An argument that the mathematics cannot take; its text says which, and why."""


class StageError(Exception):
    """A failure that the user can mend. Its text names the thing and the mend; the command line prints it as it is."""


@contextmanager
def naming(thing: object, mend: str = "") -> Iterator[None]:
    """Turn what the mathematics refuses into the line of a stage.

    Args:
        thing: the file or the setting that the argument came from.
        mend: what to do about it.

    Raises:
        StageError: `thing: what is wrong: mend`, in place of an `InvalidArgument`.
    """
    try:
        yield
    except InvalidArgument as error:
        raise StageError(": ".join(filter(None, (str(thing), str(error), mend)))) from error


def one_line(error: BaseException) -> str:
    """What an error says, short and on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Stopped(Exception):
    """The process was asked to stop; its state is saved."""
