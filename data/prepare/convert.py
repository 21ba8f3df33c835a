"""A published data set to a row file that `--data.path` takes.

    python -m cosmo_rl.data.prepare convert --name vlguard --in FOLDER --out rows.jsonl [--limit 1000]
    python -m cosmo_rl.data.prepare convert --list     # all adapters: tasks, licence, files, fields

Every image is decoded once. One that lies beside or below the row file is named by its relative path, any other one (an
embedded one too) is copied into OUT_images/ under the hash of its content. The row file appears whole or not at all.
A record that gives no row (bad fields, missing or broken image) is left out, counted and shown with its reason.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import UserError
from ..schema import RowError, open_image
from ..terminal import printable
from .adapters.registry import adapter, table
from .options import Convert
from .writer import Reasons, row_writer


@dataclass
class Summary:
    """What a conversion gave."""

    rows: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(domain, task, combined tag or "-") -> rows."""
    left_out: int = 0
    """Records, or single rows of one, that gave no row."""
    rejected: Reasons = field(default_factory=Reasons)
    """(field, mend) -> problems of those left out; one may have several."""
    licences: set[str] = field(default_factory=set)

    def reject(self, error: RowError) -> None:
        """Count a record that gave no row."""
        self.left_out += 1
        for one in error.problems:
            _, name, _, mend = one.args
            self.rejected.add((re.sub(r"\[\d+\]", "[]", name), mend), str(one))

    def table(self) -> str:
        """Rows by domain, task and tag, then the reasons of what was rejected, the most frequent first."""
        lines = [f"{'domain':<16}{'task':<12}{'combined':<10}{'rows':>9}"]
        lines += [f"{domain:<16}{task:<12}{tag:<10}{count:>9}"
                  for (domain, task, tag), count in sorted(self.rows.items())]
        lines.append(f"{'total':<38}{self.rows.total():>9}   licence: {', '.join(sorted(self.licences))}")
        if self.left_out:
            lines.append(f"{'rejected':<38}{self.left_out:>9}")
            lines += [f"{count:>9}  as {self.rejected.examples[reason]}"
                      for reason, count in self.rejected.counts.most_common()]
        return printable("\n".join(lines), keep="\n")


def main(options: Convert) -> None:
    """The program; errors as `convert`."""
    print(table() if options.list_ else f"{printable(options.out)}\n{convert(options).table()}")


def convert(options: Convert) -> Summary:
    """Write the row file.

    Raises:
        UserError: no such adapter, an option it does not take, a row file that is there, another layout, no row.
    """
    for option, value in (("name", options.name), ("in", options.in_), ("out", options.out)):
        if not value:
            raise UserError(f"--{option} is missing; give --name, --in and --out (--list shows the adapters)")
    out, rows = Path(options.out), adapter(options.name)
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}; give a name that ends in .jsonl")
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} is there; give another --out, or --overwrite")
    read = rows.named_files(options.in_)
    if out.exists() and out.resolve() in {file.resolve() for file in read}:
        raise UserError(f"{out} is one of the files that --in names; give another --out")
    if options.limit < 0:
        raise UserError(f"--limit is {options.limit}; give a number of rows, or 0 for all")
    unlabelled = "" if options.unlabelled == "default" else options.unlabelled
    if unlabelled and not rows.unlabelled:
        raise UserError(f"{options.name} labels its prompts; leave --unlabelled out")
    fixed = {name: value for name in ("domain", "source", "licence") if (value := getattr(options, name))}
    for name, value in fixed.items():
        if not value.strip():
            raise UserError(f"--{name} is blank; give a name, or leave it out")

    summary = Summary()
    with row_writer(out.parent, f"{out.stem}_images", in_place=True) as writer:
        for row in rows(options.in_, images=options.images or None, reject=summary.reject, unlabelled=unlabelled):
            try:
                images = [writer.image(image, partial(open_image, image, options.max_image_pixels, f"row {row['id']}",
                                                      f"images[{i}]")) for i, image in enumerate(row.get("images", ()))]
            except RowError as error:
                summary.reject(error)
                continue
            row |= ({"images": images} if images else {}) | fixed
            writer.write(out, row)
            summary.rows[row["domain"], row["task"], row.get("tags", {}).get("combined", "-")] += 1
            summary.licences.add(row["licence"])
            if summary.rows.total() == options.limit:
                break
        if not summary.rows:
            raise UserError(f"{', '.join(options.in_)} gave no row, so {out} was not written\n{summary.table()}")
    return summary
