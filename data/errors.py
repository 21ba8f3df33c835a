"""The errors that a user can mend: one in general, and one that tells all that is wrong with a row of data."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from .terminal import printable


class UserError(ValueError):
    """What a user got wrong, with the bad value and the mend: told in one line, without a traceback.

    Commands catch this class alone, so that a ValueError that nobody raised on purpose, as of a zip() of unequal
    lengths, keeps its traceback: it is a bug of ours. The kernels, which are a library, raise plain ValueErrors.
    """


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; names the pip line."""


MOST_TOLD = 12
"""Problems of one row that its message spells out."""
T = TypeVar("T")


class RowError(UserError):
    """A bad row: `WHERE: field `FIELD`: PROBLEM; MEND`, where WHERE is FILE:LINE or FILE and FIELD may be empty.

    One of several problems (`several`) has those of the first in `args`, all of them in `problems` and in its message:
    `WHERE: 2 problems: (1) field `FIELD`: PROBLEM; MEND (2) ...`.
    """

    def __init__(self, where: str, field: str, problem: str, mend: str) -> None:
        super().__init__(where, shown(field), shown(problem, 400), mend)
        self.where, self.field, self.problem, self.mend = self.args
        self._others: tuple[RowError, ...] = ()

    @classmethod
    def several(cls, errors: "Iterable[RowError]") -> "RowError":
        """One error of all the problems of a row, of which there is at least one."""
        first, *others = (one for error in errors for one in error.problems)
        if others:
            first = RowError(*first.args)
            first._others = tuple(others)
        return first

    @property
    def problems(self) -> "tuple[RowError, ...]":
        """An error for each problem, in the order of the message."""
        return (RowError(*self.args), *self._others) if self._others else (self,)

    def __str__(self) -> str:
        if not self._others:
            field = f"field `{self.field}`: " if self.field else ""
            return f"{self.where}: {field}{self.problem}; {self.mend}"
        where, count = self.where, 1 + len(self._others)
        told = [f"({i}) {str(one).removeprefix(f'{where}: ')}" for i, one in enumerate(self.problems[:MOST_TOLD], 1)]
        more = [f"... and {count - MOST_TOLD} more"] if count > MOST_TOLD else []
        return f"{where}: {count} problems: {' '.join(told + more)}"


class Problems:
    """The problems of a row, gathered so that all are told at once."""

    def __init__(self) -> None:
        self.found: list[RowError] = []

    def take(self, parse: Callable[..., T], *args: Any) -> T:
        """What `parse` returns. Where it raises a RowError that is noted, and the None returned stands for no value."""
        try:
            return parse(*args)
        except RowError as error:
            self.found.append(error)
            return cast(T, None)

    def add(self, where: str, field: str, problem: str, mend: str) -> None:
        """Note a problem; arguments as those of RowError."""
        self.found.append(RowError(where, field, problem, mend))

    def settle(self) -> None:
        """Raise what was noted, as one RowError."""
        if self.found:
            raise RowError.several(self.found)


def shown(value: object, limit: int = 80) -> str:
    """What came from a file, in one line: control characters escaped, the middle of a long one left out."""
    text = str(value)
    if len(text) > limit:  # to less than the limit: errors that are made again from their `args` stay as they are
        text = f"{text[:limit // 2]}...{text[-limit // 4:]}"
    return printable(text)
