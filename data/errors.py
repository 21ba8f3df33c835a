"""The one error that a user can mend."""


class UserError(ValueError):
    """What a user got wrong, with the bad value and the mend: told in one line, without a traceback.

    Commands catch this class alone, so that a ValueError that nobody raised on purpose, as of a zip() of unequal
    lengths, keeps its traceback: it is a bug of ours. The kernels, which are a library, raise plain ValueErrors.
    """


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; names the pip line."""
