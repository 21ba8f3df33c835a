"""Rows under jailbreak attacks, as a folder or file of rows with their images: `augment --in rows.jsonl --out DIR`.

rows.jsonl, heldout.jsonl, images/ and the contact sheet appear together or not at all. Each row is followed by its
attacked versions, by family, kind and name of the attack. An image that no attack touched is copied byte for byte.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from cosmo_rl.cpgd.judges.spec import Server, parse_server

from ..errors import UserError
from ..index import load_rows
from ..schema import Row, parse_row
from .jailbreak.contact_sheet import ContactSheet
from .jailbreak.image import Carriers
from .jailbreak.registry import FAMILIES, OFFLINE, Attack, find, ordered
from .jailbreak.render import rapidocr
from .jailbreak.rows import Assignment, AttackerReplies, Outcome, assign, augment, twin_keys
from .options import Augment
from .writer import COMPRESS_LEVEL, Reasons, row_writer

CACHE = "endpoint_cache"
ROWS, HELDOUT, SHEET, IMAGES = "rows.jsonl", "heldout.jsonl", "contact_sheet.png", "images"
MOST_PROBLEMS = 8
"""Reasons shown for an attack that dropped rows."""


def main(options: Augment) -> None:
    """The program.

    Raises:
        UserError: what a user can get wrong (RowError and Unfit among them).
        MissingPackage: --ocr without rapidocr-onnxruntime.
    """
    if not options.inputs:
        raise UserError("--in names no file; give .jsonl or .parquet files, or saved datasets")
    heldout = find(options.holdout)
    families = FAMILIES if options.endpoint else OFFLINE
    attacks = [attack for attack in find(options.attacks or families) if attack not in heldout]
    if not attacks:
        raise UserError("--holdout holds out every attack; name fewer, or more --attacks")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; give 0 or more")
    server = parse_server(options.endpoint, "--endpoint") if options.endpoint else None
    asking = [attack.name for attack in (*attacks, *heldout) if attack.family == "endpoint"]
    if asking and server is None:
        raise UserError(f"{', '.join(asking)}: a model is asked; name one with --endpoint URL,MODEL, or leave "
                        "them out")
    params = read_params(options.param, [*attacks, *heldout], options.resize_pixels)
    read = rapidocr() if options.ocr else None
    out = Path(options.out)
    rows_path = out if out.suffix == ".jsonl" else out / ROWS
    folder = rows_path.parent
    heldout_path, sheet_path = folder / HELDOUT, Path(options.contact_sheet or folder / SHEET)
    check_targets((heldout_path, sheet_path, rows_path), options)
    with row_writer(folder, IMAGES) as writer:
        rows = load_rows(options.inputs, max_image_pixels=options.max_image_pixels)
        keys = twin_keys(rows, options.twin_by)
        assignments = []
        for group in (attacks, heldout):
            number = len(group) if options.per_row == "all" else options.per_row
            number = min(number, len(group)) if group is heldout else number
            assignments += assign(rows, keys, group, per_row=number, seed=options.seed) if group else []
        carriers = None
        if any(one.attack.family == "image" for one in assignments):
            carriers = Carriers(rows, keys, seed=options.seed, max_image_pixels=options.max_image_pixels)
        settled = ask(server, options, rows, assignments, params, folder) if asking and server else {}
        sheet = ContactSheet(options.max_image_pixels, frozenset(attack.name for attack in heldout))
        table = AttackTable(rows)
        order = {attack.name: number for number, attack in enumerate(ordered(), start=1)}
        made: dict[Path, list[tuple[int, int, dict[str, Any]]]] = {rows_path: [], heldout_path: []}
        ids = set[str]()

        def add(row: Row, index: int, path: Path) -> None:
            if row.id in ids:
                raise UserError(f"two rows would have the id {row.id!r}; rename one of their sources")
            ids.add(row.id)
            record = {f.name: value for f in fields(row) if (value := getattr(row, f.name)) not in (None, ())}
            record |= {"images": [writer.image(image) for image in row.images]} if row.images else {}
            parse_row(record, f"row {row.id}")  # a transform may write a reserved token
            made[path].append((index, order[row.attack["name"]] if row.attack else 0, record))

        for index, row in enumerate(rows) if options.keep_plain else ():
            add(row, index, rows_path)
        outcomes = augment(rows, assignments, seed=options.seed, carriers=carriers, params=params,
                           drop=options.drop_illegible, read=read, max_image_pixels=options.max_image_pixels,
                           settled=settled)
        console = Console(stderr=True)
        for outcome in track(outcomes, "attacking", total=len(assignments), console=console,
                             disable=not console.is_terminal, transient=True):
            table.add(outcome)
            path = heldout_path if outcome.assignment.attack.name in sheet.heldout else rows_path
            for index, row in zip(outcome.assignment.rows, outcome.rows, strict=bool(outcome.rows)):
                add(row, index, path)
                sheet.add(row)
        table.show(sheet.heldout)
        if not made[rows_path]:
            raise UserError(f"no row is left for {rows_path}: every one was dropped; see the reasons above, or "
                            "name other attacks")
        for path, records in made.items():
            for *_, record in sorted(records, key=lambda one: one[:2]):
                writer.write(path, record)
        if not made[heldout_path]:
            writer.remove(heldout_path)  # of an earlier run: it would not belong to these rows
        sheet.draw().save(writer.beside(sheet_path), "PNG", compress_level=COMPRESS_LEVEL)
    written = [f"{len(records)} rows to {path}" for path, records in made.items() if records]
    Console(highlight=False, soft_wrap=True).print(f"wrote {', '.join(written)}, samples to {sheet_path}", markup=False)


def check_targets(targets: Sequence[Path], options: Augment) -> None:
    """Nothing is written over that the user has not given up: `targets` are (held-out rows, contact sheet, rows).

    Raises:
        UserError: two are one file, one is a folder or an input, or is there already (without --overwrite).
    """
    _, sheet_path, rows_path = targets
    if rows_path.name == HELDOUT:
        raise UserError(f"--out {rows_path}: {HELDOUT} is the file of the held-out attacks; name it otherwise")
    if len({path.resolve() for path in targets}) < len(targets):
        raise UserError(f"--contact-sheet {sheet_path} is a file of --out; name it otherwise")
    for path in targets:
        if path.is_dir():
            raise UserError(f"{path} is a folder; remove it, or name another --out")
        if any(path.resolve() == Path(item).resolve() for item in options.inputs):
            raise UserError(f"{path} is an input; name another --out")
        if path.exists() and not options.overwrite:
            raise UserError(f"{path} is there already; name another --out, or replace it with --overwrite")


def ask(server: Server, options: Augment, rows: Sequence[Row], assignments: Sequence[Assignment],
        params: dict[str, dict[str, Any]], folder: Path) -> dict[tuple[str, str], AttackerReplies]:
    """What the model of --endpoint says about the rows of endpoint attacks."""
    from .jailbreak.asking import open_model, settle  # here: a client of servers is slow to import

    number = sum(one.attack.family == "endpoint" for one in assignments)
    console = Console(stderr=True)
    with open_model(server, options.endpoint_cache or folder / CACHE, max_pixels=options.resize_pixels) as model, \
            Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("asking", total=number)
        return settle(rows, assignments, model, seed=options.seed, params=params,
                      max_image_pixels=options.max_image_pixels, done=lambda: progress.advance(task))


def read_params(entries: Sequence[str], attacks: Sequence[Attack], resize_pixels: int) -> dict[str, dict[str, Any]]:
    """--param entries as attack -> parameters, checked.

    Raises:
        UserError: not NAME.KEY=VALUE or KEY=VALUE, an attack or parameter that is not there, a value of another type.
    """
    out: dict[str, dict[str, Any]] = {attack.name: {} for attack in attacks}
    for attack in attacks:
        if "resize_pixels" in attack.params:
            out[attack.name]["resize_pixels"] = resize_pixels
    for entry in entries:
        left, equals, value = entry.partition("=")
        name, dot, key = left.rpartition(".")
        if not equals or not key:
            raise UserError(f"--param {entry!r}; write NAME.KEY=VALUE, as caesar.shift=5, or KEY=VALUE for all")
        if key == "resize_pixels":
            raise UserError(f"--param {entry!r}; give --resize-pixels instead")
        if dot and name not in out:
            near = get_close_matches(name, out, n=2)
            raise UserError(f"--param {entry!r}: attack {name!r} is not among those of this run"
                            + (f"; did you mean {' or '.join(near)}?" if near else f" ({', '.join(out)})"))
        having = [attack for attack in attacks if key in attack.params and (not dot or attack.name == name)]
        if not having:
            keys = sorted({key for attack in attacks if not dot or attack.name == name for key in attack.params})
            raise UserError(f"--param {entry!r}: no parameter {key!r}; there are {', '.join(keys) or 'none'}")
        for attack in having:
            kind = type(attack.params[key])
            try:
                out[attack.name][key] = kind(value)
            except ValueError as error:
                raise UserError(f"--param {entry!r} is no {kind.__name__}; give one, as {attack.params[key]!r}"
                                ) from error
    for attack in attacks:
        attack.resolve(out[attack.name])
    return out


@dataclass
class AttackTable:
    """What each attack met, and why it dropped rows."""

    rows: Sequence[Row]
    met: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """(attack, whether the row is unsafe) -> attacked rows."""
    dropped: dict[str, Reasons] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        name = outcome.assignment.attack.name
        if not outcome.rows:
            self.dropped.setdefault(name, Reasons()).add(outcome.problem, outcome.reason, len(outcome.assignment.rows))
        self.met.update((name, row.is_unsafe) for row in outcome.rows)

    def show(self, heldout: frozenset[str]) -> None:
        """The table, and why rows were dropped."""
        console = Console(highlight=False)
        unsafe = sum(row.is_unsafe for row in self.rows)
        table = Table(title=f"{len(self.rows)} rows, {unsafe / len(self.rows):.1%} unsafe", title_justify="left",
                      box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for column in ("attack", "kind", "file"):
            table.add_column(column, no_wrap=True)
        for column in ("rows", "unsafe", "benign", "unsafe %", "dropped"):
            table.add_column(column, justify="right", no_wrap=True)
        for attack in ordered():
            name, (unsafe, benign) = attack.name, (self.met[attack.name, label] for label in (True, False))
            dropped = self.dropped[name].counts.total() if name in self.dropped else 0
            if unsafe + benign + dropped:
                share = f"{100 * unsafe / (unsafe + benign):.1f}" if unsafe + benign else "-"
                table.add_row(name, attack.kind, "heldout" if name in heldout else "rows", str(unsafe + benign),
                              str(unsafe), str(benign), share, str(dropped))
        console.print(table)
        for name, reasons in self.dropped.items():
            first = next(iter(reasons.examples.values()))
            console.print(f"dropped {reasons.counts.total()} of {name}, as: {first}", markup=False, soft_wrap=True)
            for problem, number in reasons.counts.most_common(MOST_PROBLEMS) if len(reasons.counts) > 1 else ():
                console.print(f"    {number}: {problem}", markup=False, soft_wrap=True)
