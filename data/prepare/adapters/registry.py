"""The adapters by name."""

from difflib import get_close_matches

from ...errors import UserError
from . import instructions, reasoning, safety  # noqa: F401  they declare the adapters
from .reading import ADAPTERS, Adapter

NAMES = tuple(sorted(ADAPTERS))


def adapter(name: str) -> Adapter:
    """The adapter of a name.

    Raises:
        UserError: there is none.
    """
    if name not in ADAPTERS:
        near = get_close_matches(name.lower().replace("-", "_"), NAMES, n=1, cutoff=0.5)
        raise UserError(f"there is no adapter {name!r}; " + (f"did you mean {near[0]}? " if near else "")
                        + f"There are {', '.join(NAMES)}")
    return ADAPTERS[name]


def table() -> str:
    """All adapters: name and tasks, then source, licence, files of a folder and fields of a record."""
    lines = []
    for name in NAMES:
        one = ADAPTERS[name]
        fields = " | ".join(", ".join(sorted(fields)) for fields in one.fields)
        lines += [f"{name:<20}{', '.join(one.tasks)}", f"    {one.source}; licence: {one.licence}",
                  f"    files:  {', '.join(one.files) or 'named one by one'}", f"    fields: {fields}"]
    return "\n".join(lines)
