"""Command line: `python -m cosmo_rl.data.prepare.jailbreak --in rows.jsonl --out DIR`; offline but for --endpoint."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from cosmo_rl.cpgd.judges.endpoint_spec import Server, parse_server

from ...errors import UserError
from ...index import load_rows
from ...schema import Row
from .asking import open_model, settle
from .augment import Done, Settled, Unit, augment, deal, is_unsafe, twin_keys
from .carriers import Carriers
from .contact_sheet import ContactSheet
from .output import Output
from .registry import FAMILIES, OFFLINE, Attack, find, ordered
from .render import rapidocr

PROGRAM = "python -m cosmo_rl.data.prepare.jailbreak"
CACHE = "endpoint_cache"
MOST_PROBLEMS = 8
"""Reasons shown for an attack that dropped rows."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Jailbreak augmentation of your own rows: every row, unsafe or benign, meets the same attacks and keeps its label.

    An attack is named by itself, by its kind (cipher, mixing, ...) or by its family (text, image, endpoint).
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.arg(name="in")]
    """Row files (.jsonl, .parquet) or saved Hugging Face datasets, with plain rows."""
    out: str
    """Folder for rows.jsonl and images/, or the rows' own file NAME.jsonl, beside which images/ goes."""
    attacks: tuple[str, ...] = ()
    """Attacks to draw from; empty: all, those of the family endpoint only with --endpoint."""
    holdout: tuple[str, ...] = ()
    """Attacks kept out of the rows and written to heldout.jsonl, for evaluation; name kinds, to keep out all alike."""
    per_row: int | Literal["all"] = 1
    """Different attacks of each row, dealt so that each attack meets unsafe rows in the share of the input."""
    twin_by: str = ""
    r"""Rows whose ids agree in what this regular expression matches (in its first group, if it has one) are twins, and
    meet the same attacks with the same parameters and seed, as '^(.*)-[abc]$'; empty: no twins."""
    endpoint: str = ""
    """Model that the attacks of the family endpoint ask, as URL,MODEL[,key=VARIABLE][,in-flight=N][,timeout=SECONDS]
    [,attempts=N]; key names the environment variable that holds its API key."""
    endpoint_cache: str = ""
    """Folder of its replies, all of which are kept: the same command again asks for none; empty: endpoint_cache beside
    the rows."""
    seed: int = 0
    """Of the dealing and of the attacks."""
    keep_plain: bool = False
    """Write the plain rows to rows.jsonl too."""
    param: tuple[str, ...] = ()
    """Parameters, as caesar.shift=5, or size=336 for every attack that has one."""
    resize_pixels: int = 1_003_520
    """The model shrinks pictures to this many pixels (width x height); text must be legible after that."""
    drop_illegible: bool = False
    """Drop a row, and its twins, from an offline attack that cannot take it (text that cannot be drawn legibly, or that
    it leaves as it is), and count it; else an error."""
    ocr: bool = False
    """Drawn text must be read back by rapidocr-onnxruntime too; about a second a picture."""
    contact_sheet: str = ""
    """PNG with samples of each attack; empty: contact_sheet.png beside the rows."""
    max_image_pixels: int = 16_777_216
    """Largest image accepted, in pixels (width x height), against decompression bombs."""
    overwrite: bool = False
    """Replace the files of an earlier run."""


def main(args: Sequence[str] | None = None) -> int:
    """Parse `args` (sys.argv by default) and run; a user's error is one line on stderr, and exit code 1."""
    options = tyro.cli(Options, args=args, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        run(options)
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: Options) -> None:
    """The whole job.

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
    with Output(options.out, sheet=options.contact_sheet, inputs=options.inputs, overwrite=options.overwrite) as output:
        rows = load_rows(options.inputs, max_image_pixels=options.max_image_pixels)
        attacked = next((row for row in rows if row.attack is not None), None)
        if attacked is not None and attacked.attack is not None:
            raise UserError(f"row {attacked.id} is already the work of attack {attacked.attack['name']!r}; give plain "
                            "rows only")
        keys = twin_keys(rows, options.twin_by)
        units = []
        for group in (attacks, heldout):
            number = len(group) if options.per_row == "all" else options.per_row
            number = min(number, len(group)) if group is heldout else number
            units += deal(rows, keys, group, per_row=number, seed=options.seed) if group else []
        carriers = None
        if any(unit.attack.family == "image" for unit in units):
            carriers = Carriers(rows, keys, seed=options.seed, max_image_pixels=options.max_image_pixels)
        settled = ask(server, options, rows, units, params, output.folder) if asking and server else {}
        sheet = ContactSheet(options.max_image_pixels, frozenset(attack.name for attack in heldout))
        tally = Tally(rows)
        place_of = {attack.name: place for place, attack in enumerate(ordered(), start=1)}
        if options.keep_plain:
            for place, row in enumerate(rows):
                output.add(row, (place, 0))
        work = augment(rows, units, seed=options.seed, carriers=carriers, params=params, drop=options.drop_illegible,
                       read=read, max_image_pixels=options.max_image_pixels, settled=settled)
        console = Console(stderr=True)
        for done in track(work, "attacking", total=len(units), console=console, disable=not console.is_terminal,
                          transient=True):
            tally.add(done)
            name = done.unit.attack.name
            for place, row in zip(done.unit.rows, done.rows, strict=bool(done.rows)):
                output.add(row, (place, place_of[name]), heldout=name in sheet.heldout)
                sheet.add(row)
        tally.show(sheet.heldout)
        output.add_sheet(sheet.draw())
        output.commit()
    written = [f"{output.counts[path]} rows to {path}" for path in output.counts if output.counts[path]]
    Console(highlight=False, soft_wrap=True).print(f"wrote {', '.join(written)}, samples to {output.sheet_path}",
                                                   markup=False)


def ask(server: Server, options: Options, rows: Sequence[Row], units: Sequence[Unit], params: dict[str, dict[str, Any]],
        folder: Path) -> dict[tuple[str, str], Settled]:
    """What the model of --endpoint says about the units of endpoint attacks."""
    number = sum(unit.attack.family == "endpoint" for unit in units)
    console = Console(stderr=True)
    with open_model(server, options.endpoint_cache or folder / CACHE, max_pixels=options.resize_pixels) as model, \
            Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("asking", total=number)
        return settle(rows, units, model, seed=options.seed, params=params, max_image_pixels=options.max_image_pixels,
                      done=lambda: progress.advance(task))


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


class Tally:
    """What each attack met, for the table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.unsafe: Counter[str] = Counter()
        self.benign: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        """Of the first unit dropped, in full."""
        self.problems: dict[str, Counter[str]] = {}
        """Rows dropped by reason."""

    def add(self, done: Done) -> None:
        """Count one unit."""
        name = done.unit.attack.name
        if not done.rows:
            self.dropped[name] += len(done.unit.rows)
            self.reasons.setdefault(name, done.reason)
            self.problems.setdefault(name, Counter())[done.problem] += len(done.unit.rows)
        for row in done.rows:
            (self.unsafe if is_unsafe(row) else self.benign)[name] += 1

    def show(self, heldout: frozenset[str]) -> None:
        """The table, and why rows were dropped."""
        console = Console(highlight=False)
        unsafe = sum(map(is_unsafe, self.rows))
        table = Table(title=f"{len(self.rows)} rows, {unsafe / len(self.rows):.1%} unsafe", title_justify="left",
                      box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for column in ("attack", "kind", "file"):
            table.add_column(column, no_wrap=True)
        for column in ("rows", "unsafe", "benign", "unsafe %", "dropped"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, attack in ((attack.name, attack) for attack in ordered()):
            number = self.unsafe[name] + self.benign[name]
            if number + self.dropped[name]:
                share = f"{100 * self.unsafe[name] / number:.1f}" if number else "-"
                table.add_row(name, attack.kind, "heldout" if name in heldout else "rows", str(number),
                              str(self.unsafe[name]), str(self.benign[name]), share, str(self.dropped[name]))
        console.print(table)
        for name, reason in self.reasons.items():
            console.print(f"dropped {self.dropped[name]} of {name}, as: {reason}", markup=False, soft_wrap=True)
            if len(self.problems[name]) > 1:
                for problem, number in self.problems[name].most_common(MOST_PROBLEMS):
                    console.print(f"    {number}: {problem}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
