"""The adapters by name, and which of them a record might be for."""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from ...errors import UserError
from .reading import Layout

NAMES = ("beavertails_v", "flames", "geometry3k", "gsm8k", "hendrycks_math", "ifeval", "jailbreakv_28k", "llava",
         "mathv360k", "mmk12", "mmmu", "multimodal_open_r1", "pku_saferlhf", "rlvr_ifeval", "safetag_vl", "safework",
         "scienceqa", "spa_vl", "vlguard", "wildjailbreak")
"""Each is a module beside this one, with LAYOUT and rows(source, *, images=None, reject=fail)."""


def adapter(name: str) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function `rows` of an adapter.

    Raises:
        UserError: there is no adapter of that name.
    """
    _known(name)
    return import_module(f".{name}", __package__).rows


def layout(name: str) -> Layout:
    """The layout of an adapter; errors as `adapter`."""
    _known(name)
    return import_module(f".{name}", __package__).LAYOUT


def _known(name: str) -> None:
    if name not in NAMES:
        near = get_close_matches(name.lower().replace("-", "_"), NAMES, n=1, cutoff=0.5)
        raise UserError(f"there is no adapter {name!r}; " + (f"did you mean {near[0]}? " if near else "")
                        + f"There are {', '.join(NAMES)}")


def guess(data: Mapping[str, Any]) -> list[str]:
    """Names of the adapters whose fields a record has, the one with the most fields first."""
    fits = {name: layout(name).fit(data) for name in NAMES}
    return sorted((name for name in NAMES if fits[name]), key=lambda name: -fits[name])


def table() -> str:
    """All adapters: name and tasks, then source, licence, files of a folder and fields of a record."""
    lines = []
    for name in NAMES:
        one = layout(name)
        fields = " | ".join(", ".join(sorted(fields)) for fields in one.fields)
        lines += [f"{name:<20}{', '.join(one.tasks)}", f"    {one.source}; licence: {one.licence}",
                  f"    files:  {', '.join(one.files) or 'named one by one'}", f"    fields: {fields}"]
    return "\n".join(lines)
