"""A published data set to a row file that `--data.path` takes.

    python -m cosmo_rl.data.prepare.adapters.convert --name vlguard --in FOLDER --out rows.jsonl [--limit 1000]
    python -m cosmo_rl.data.prepare.adapters.convert --list     # all adapters: tasks, licence, files, fields

Every image is decoded once. One that lies beside or below the row file is named by its relative path, any other one (an
embedded one too) is copied into OUT_images/ under the hash of its content. The row file appears whole or not at all.
A record that gives no row (bad fields, missing or broken image) is left out, counted and shown with its reason.
"""

import hashlib
import inspect
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image

from ...disk import fsync
from ...errors import UserError
from ...schema import RowError, open_image
from ...terminal import printable
from .reading import named_files
from .registry import adapter, layout, table


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a published data set to rows as JSON lines."""

    list_: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name="list")] = False
    """Print all adapters, with the tasks of their rows, source, licence, files and fields, and end."""
    name: str = ""
    """Adapter; --list shows them."""
    in_: Annotated[tuple[str, ...], tyro.conf.arg(name="in")] = ()
    """The set's folder (its training split is read), some of its files, or a saved Hugging Face dataset. Rows of files
    with the same name have ids of their own only if the files are given together."""
    out: str = ""
    """Row file to write, ending in .jsonl."""
    images: str = ""
    """Folder that image paths start from; empty: as the set is published."""
    limit: int = 0
    """Stop after this many rows; 0: all."""
    domain: str = ""
    """Domain of all rows; empty: each row's task."""
    source: str = ""
    """Source of all rows; empty: the set's name."""
    licence: str = ""
    """Licence of all rows; empty: as published."""
    unlabelled: Literal["default", "unsafe", "safe", "reject"] = "default"
    """For spa_vl, pku_saferlhf and safework: what prompts without a safety label become; default: unsafe for spa_vl,
    else reject."""
    max_image_pixels: int = 16_777_216
    """Largest image accepted, in pixels (width x height); a larger one rejects its record."""
    overwrite: bool = False
    """Replace a row file that is there."""


@dataclass
class Summary:
    """What a conversion gave."""

    rows: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(domain, task, combined tag or "-") -> rows."""
    left_out: int = 0
    """Records, or single rows of one, that gave no row."""
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(field, mend) -> problems of those left out; one may have several."""
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    """The first message of each reason."""
    licences: set[str] = field(default_factory=set)

    def reject(self, error: RowError) -> None:
        """Count a record that gave no row."""
        self.left_out += 1
        for one in error.problems:
            _, name, _, mend = one.args
            reason = re.sub(r"\[\d+\]", "[]", name), mend
            self.rejected[reason] += 1
            self.examples.setdefault(reason, str(one))

    def table(self) -> str:
        """Rows by domain, task and tag, then the reasons of what was rejected, the most frequent first."""
        lines = [f"{'domain':<16}{'task':<12}{'combined':<10}{'rows':>9}"]
        lines += [f"{domain:<16}{task:<12}{tag:<10}{count:>9}"
                  for (domain, task, tag), count in sorted(self.rows.items())]
        lines.append(f"{'total':<38}{self.rows.total():>9}   licence: {', '.join(sorted(self.licences))}")
        if self.rejected:
            lines.append(f"{'rejected':<38}{self.left_out:>9}")
            lines += [f"{count:>9}  as {self.examples[reason]}" for reason, count in self.rejected.most_common()]
        return printable("\n".join(lines), keep="\n")


def convert(options: Convert) -> Summary:
    """Write the row file.

    Raises:
        UserError: no such adapter, an option it does not take, a row file that is there, another layout, no row.
    """
    for option, value in (("name", options.name), ("in", options.in_), ("out", options.out)):
        if not value:
            raise UserError(f"--{option} is missing; give --name, --in and --out (--list shows the adapters)")
    out = Path(options.out)
    rows = adapter(options.name)
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}; give a name that ends in .jsonl")
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} is there; give another --out, or --overwrite")
    read = named_files(options.in_, layout(options.name))
    if out.exists() and out.resolve() in {file.resolve() for file in read}:
        raise UserError(f"{out} is one of the files that --in names; give another --out")
    if options.limit < 0:
        raise UserError(f"--limit is {options.limit}; give a number of rows, or 0 for all")
    more: dict[str, Any] = {"images": options.images} if options.images else {}
    if options.unlabelled != "default":
        if "unlabelled" not in inspect.signature(rows).parameters:
            raise UserError(f"{options.name} labels its prompts; leave --unlabelled out")
        more["unlabelled"] = options.unlabelled
    fixed = {name: value for name in ("domain", "source", "licence") if (value := getattr(options, name))}
    for name, value in fixed.items():
        if not value.strip():
            raise UserError(f"--{name} is blank; give a name, or leave it out")

    summary = Summary()
    out.parent.mkdir(parents=True, exist_ok=True)
    files = ImageFiles(out, options.max_image_pixels)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            for row in _placed(rows(options.in_, reject=summary.reject, **more), files, summary):
                row |= fixed
                file.write(json.dumps(row) + "\n")
                tag = row.get("tags", {}).get("combined", "-")
                summary.rows[row["domain"], row["task"], tag] += 1
                summary.licences.add(row["licence"])
                if summary.rows.total() == options.limit:
                    break
            if not summary.rows:
                raise UserError(f"{', '.join(options.in_)} gave no row, so {out} was not written\n{summary.table()}")
            file.flush()
            os.fsync(file.fileno())
        if files.copied:
            os.sync()  # all images at once: an fsync for each would take most of the time
        os.replace(beside, out)
        fsync(out.parent)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()
    return summary


class ImageFiles:
    """Where the images of a row file lie; each distinct one is decoded and, if need be, copied once."""

    def __init__(self, out: Path, max_pixels: int) -> None:
        self.home = Path(os.path.abspath(out.parent))
        self.folder = self.home / f"{out.stem}_images"
        self.max_pixels = max_pixels
        self.copied = 0
        self._names: dict[str | bytes, str] = {}

    def name(self, image: str | bytes, where: str, field: str) -> str:
        """The image's path relative to the row file.

        Raises:
            RowError: it cannot be decoded.
        """
        key = image if isinstance(image, str) else hashlib.blake2b(image, digest_size=16).digest()
        if key not in self._names:
            open_image(image, self.max_pixels, where, field)
            if isinstance(image, str) and Path(image).is_relative_to(self.home):
                self._names[key] = Path(image).relative_to(self.home).as_posix()
            else:
                content = Path(image).read_bytes() if isinstance(image, str) else image
                self._names[key] = self._copy(content)
        return self._names[key]

    def _copy(self, content: bytes) -> str:
        with Image.open(BytesIO(content)) as image:
            suffix = {"JPEG": "jpg"}.get(image.format or "", (image.format or "").lower())
        path = self.folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.{suffix}"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.write_bytes(content)
            os.replace(beside, path)
            self.copied += 1
        return path.relative_to(self.home).as_posix()


def _placed(rows: Iterator[dict[str, Any]], files: ImageFiles, summary: Summary) -> Iterator[dict[str, Any]]:
    """The rows whose images can be decoded, with the paths of those images."""
    for row in rows:
        try:
            images = [files.name(image, f"row {row['id']}", f"images[{i}]")
                      for i, image in enumerate(row.get("images", []))]
        except RowError as error:
            summary.reject(error)
            continue
        yield row | ({"images": images} if images else {})


def main(args: list[str] | None = None) -> None:
    """The command line; ends with status 1 and one message on an error."""
    options = tyro.cli(Convert, args=args, prog="python -m cosmo_rl.data.prepare.adapters.convert")
    if options.list_:
        print(table())
        return
    try:
        summary = convert(options)
    except (UserError, OSError) as error:
        sys.exit(f"convert: {printable(str(error), keep=chr(10))}")
    print(f"{printable(options.out)}\n{summary.table()}")


if __name__ == "__main__":
    main()
