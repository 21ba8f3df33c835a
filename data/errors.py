"""The one error that a user can mend, and what a terminal may be shown of a text that a user gave."""


class UserError(ValueError):
    """What a user got wrong, with the bad value and the mend: told in one line, without a traceback.

    Commands catch this class alone, so that a ValueError that nobody raised on purpose, as of a zip() of unequal
    lengths, keeps its traceback: it is a bug of ours. The kernels, which are a library, raise plain ValueErrors.
    """


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; names the pip line."""


def printable(text: str) -> str:
    """The text with control characters, half characters and marks that turn the direction written as escapes.

    A domain may be named "\\x1b[2J", which would clear the screen, or hold a line break.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
