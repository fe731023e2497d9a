"""What a user did wrong, in one line, and a stop on request."""


class StageError(Exception):
    """A failure that the user can mend. Its text names the thing and the mend; the command line prints it as it is."""


def one_line(error: BaseException) -> str:
    """What an error says, short and on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Stopped(Exception):
    """The process was asked to stop; its state is saved."""
