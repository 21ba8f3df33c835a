"""The written result: rows.jsonl, heldout.jsonl, images/ and the contact sheet, all of it or nothing.

Everything is written into a hidden folder beside, and renamed at the end, the rows last. Pictures are named by their
content and may join others in images/; a picture that no attack touched is copied byte for byte.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ...disk import fsync
from ...errors import UserError
from ...schema import IMAGE_FORMATS, ImageSource, Row, encoded, parse_row

ROWS, HELDOUT, SHEET, IMAGES = "rows.jsonl", "heldout.jsonl", "contact_sheet.png", "images"
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
COMPRESS_LEVEL = 4
"""Of PNG files: half the time of zlib's default, a few per cent larger."""


class Output:
    """A context manager: `add` rows, then `commit`; without a commit nothing stays."""

    def __init__(self, out: str, *, sheet: str = "", inputs: Sequence[str] = (), overwrite: bool = False) -> None:
        """`out`: a folder, or the file of the rows, beside which the rest goes.

        Raises:
            UserError: a file is there already (without `overwrite`), is an input, or the folder cannot be written.
        """
        path = Path(out)
        self.rows_path = path if path.suffix == ".jsonl" else path / ROWS
        self.folder = self.rows_path.parent
        self.heldout_path = self.folder / HELDOUT
        self.sheet_path = Path(sheet) if sheet else self.folder / SHEET
        self._staged_sheet = self.sheet_path.with_name(f".{self.sheet_path.name}.tmp")
        self.targets = (self.heldout_path, self.sheet_path, self.rows_path)
        self.counts = {self.rows_path: 0, self.heldout_path: 0}
        self._lines: dict[Path, list[tuple[int, int, str]]] = {self.rows_path: [], self.heldout_path: []}
        self._ids: set[str] = set()
        self._names: dict[Any, str] = {}
        self._made: Path | None = None
        self._sheet: Image.Image | None = None
        self._check(inputs, overwrite)

    def __enter__(self) -> "Output":
        try:
            self._made = next((p for p in reversed([self.folder, *self.folder.parents]) if not p.exists()), None)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=".jailbreak-", dir=self.folder))
            (self._temporary / IMAGES).mkdir()
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._staged_sheet.unlink(missing_ok=True)
        if kind is not None and self._made is not None:
            for folder in (self.folder, *self.folder.parents):
                if folder == self._made.parent or any(folder.iterdir()):
                    break
                folder.rmdir()

    def add(self, row: Row, order: tuple[int, int], *, heldout: bool = False) -> None:
        """One row; `order`: (place of its source, place of its attack), by which the file is sorted.

        Raises:
            RowError: the transform made a row that a loader would refuse (a reserved token, say).
            UserError: its id is given twice, or the disk is full.
        """
        if row.id in self._ids:
            raise UserError(f"two rows would have the id {row.id!r}; rename one of their sources")
        self._ids.add(row.id)
        record: dict[str, Any] = {f.name: getattr(row, f.name) for f in fields(row)}
        record = {name: value for name, value in record.items() if value not in (None, ())}
        if row.images:
            record["images"] = [f"{IMAGES}/{self._image(source)}" for source in row.images]
        parse_row(record, f"row {row.id}")
        path = self.heldout_path if heldout else self.rows_path
        self._lines[path].append((*order, json.dumps(record)))
        self.counts[path] += 1

    def add_sheet(self, sheet: Image.Image) -> None:
        """The contact sheet."""
        self._sheet = sheet

    def commit(self) -> None:
        """Everything under its final name.

        Raises:
            UserError: there is no row, or it cannot be written.
        """
        if not self.counts[self.rows_path]:
            raise UserError(f"no row is left for {self.rows_path}: every one was dropped; see the reasons above, or "
                            "name other attacks")
        try:
            staged = {path: self._write_lines(path) for path in self._lines if self._lines[path]}
            if self._sheet is not None:
                # Its folder may be on another disk, over which nothing can be renamed: written there, then renamed.
                self.sheet_path.parent.mkdir(parents=True, exist_ok=True)
                staged[self.sheet_path] = self._staged_sheet
                self._sheet.save(self._staged_sheet, "PNG", compress_level=COMPRESS_LEVEL)
                fsync(self._staged_sheet)
            self._move_images()
            for path in self.targets:
                if path in staged:
                    os.replace(staged[path], path)
                else:
                    path.unlink(missing_ok=True)
            fsync(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def _check(self, inputs: Sequence[str], overwrite: bool) -> None:
        if self.rows_path.name == HELDOUT:
            raise UserError(f"--out {self.rows_path}: {HELDOUT} is the file of the held-out attacks; name "
                            "it otherwise")
        if len({path.resolve() for path in self.targets}) < len(self.targets):
            raise UserError(f"--contact-sheet {self.sheet_path} is a file of --out; name it otherwise")
        for path in self.targets:
            if path.is_dir():
                raise UserError(f"{path} is a folder; remove it, or name another --out")
            if any(path.resolve() == Path(item).resolve() for item in inputs):
                raise UserError(f"{path} is an input; name another --out")
            if path.exists() and not overwrite:
                raise UserError(f"{path} is there already; name another --out, or replace it with --overwrite")

    def _image(self, source: ImageSource) -> str:
        """The file name of a picture, which is written once."""
        key = source if isinstance(source, str) else None
        if key in self._names:
            return self._names[key]
        try:
            if isinstance(source, Image.Image):
                picture = source.convert("RGB")
                digest = blake2b(f"{picture.size}".encode() + picture.tobytes(), digest_size=16).hexdigest()
                path = self._temporary / IMAGES / f"{digest}.png"
                if not path.exists():
                    picture.save(path, "PNG", compress_level=COMPRESS_LEVEL)
            else:
                content = encoded(source)
                with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as header:
                    extension = EXTENSIONS[header.format or "PNG"]
                path = self._temporary / IMAGES / f"{blake2b(content, digest_size=16).hexdigest()}.{extension}"
                if not path.exists():
                    path.write_bytes(content)
        except OSError as error:
            raise self._unwritable(error) from error
        if key is not None:
            self._names[key] = path.name
        return path.name

    def _write_lines(self, path: Path) -> Path:
        staged = self._temporary / path.name
        with open(staged, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for *_, line in sorted(self._lines[path]))
            file.flush()
            os.fsync(file.fileno())
        return staged

    def _move_images(self) -> None:
        made, final = self._temporary / IMAGES, self.folder / IMAGES
        names = os.listdir(made)
        for name in names:
            fsync(made / name)
        if not names:
            return
        if not final.exists():
            os.rename(made, final)
            return
        for name in names:
            os.replace(made / name, final / name)
        fsync(final)

    def _unwritable(self, error: OSError) -> UserError:
        place = error.filename or self.folder
        return UserError(f"cannot write {place}: {error.strerror or error}; free space or make its folder writable, "
                         "then repeat the command")
