"""What both programs write: row files and their images, all of it or nothing, and why rows were left out."""

import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from PIL import Image

from ..disk import fsync, replacing
from ..errors import UserError
from ..schema import IMAGE_FORMATS, ImageSource, encoded

COMPRESS_LEVEL = 4
"""Of PNG files: half the time of zlib's default, a few per cent larger."""


@dataclass
class Reasons:
    """Why records or rows gave nothing: how many for each reason, and its first message."""

    counts: Counter[Hashable] = field(default_factory=Counter)
    examples: dict[Hashable, str] = field(default_factory=dict)

    def add(self, reason: Hashable, message: str, number: int = 1) -> None:
        """`number` more, left out for `reason`, which `message` tells in full."""
        self.counts[reason] += number
        self.examples.setdefault(reason, message)


@contextmanager
def row_writer(folder: Path, images: str, *, in_place: bool = False) -> Iterator["RowWriter"]:
    """A writer of row files in `folder`, which is made where it is missing, and of images in its folder `images`.

    Everything is written beside its final name and renamed at the end of the block, the images first, then the files in
    the reverse order of their first rows. After an error nothing stays.

    Args:
        in_place: an image that lies in or below `folder` stays where it is; else it is copied too.
    Raises:
        UserError: it cannot be written.
    """
    made = next((path for path in reversed([folder, *folder.parents]) if not path.exists()), None)
    try:
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            staging = TemporaryDirectory(prefix=".rows-", dir=folder, ignore_cleanup_errors=True)
        with staging, ExitStack() as files:
            writer = RowWriter(folder / images, Path(staging.name), files, in_place)
            yield writer
            with _told(folder):
                writer.sync()
                files.close()
    finally:
        for path in (folder, *folder.parents):  # those that it made and that are still empty
            if made is None or path == made.parent or not path.exists() or any(path.iterdir()):
                break
            path.rmdir()


class RowWriter:
    """The writer of one run, by `row_writer`."""

    def __init__(self, images: Path, staging: Path, files: ExitStack, in_place: bool) -> None:
        self._images, self._staging, self._files, self._in_place = images, staging, files, in_place
        self._open: dict[Path, IO[str]] = {}
        self._names: dict[str | bytes, str] = {}
        self._moved: list[Path] = []
        files.push(lambda kind, *_: self._undo() if kind else None)  # first, so that it runs last

    def write(self, path: Path, row: Mapping[str, Any]) -> None:
        """One row more in the file `path`, as JSON; its images as `image` names them."""
        with _told(path):
            if path not in self._open:
                self._open[path] = self._files.enter_context(self.beside(path).open("w", encoding="utf-8"))
            self._open[path].write(json.dumps(row) + "\n")

    def image(self, source: ImageSource, check: Callable[[], object] = lambda: None) -> str:
        """An image's path relative to the folder of the rows; each different one is written once.

        Named by its content: a file or encoded bytes are copied byte for byte, a PIL image becomes a PNG.

        Args:
            check: called before an image that is new; may raise.
        """
        if isinstance(source, Image.Image):
            picture = source.convert("RGB")
            name = f"{_digest(f'{picture.size}'.encode() + picture.tobytes())}.png"
            return self._add(name, lambda path: picture.save(path, "PNG", compress_level=COMPRESS_LEVEL))
        key = source if isinstance(source, str) else _digest(source).encode()
        if key not in self._names:
            check()
            home = os.path.abspath(self._images.parent)
            if self._in_place and isinstance(source, str) and Path(source).is_relative_to(home):
                self._names[key] = Path(source).relative_to(home).as_posix()
            else:
                content = encoded(source)
                with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as header:
                    suffix = (header.format or "png").lower().replace("jpeg", "jpg")
                self._names[key] = self._add(f"{_digest(content)}.{suffix}", lambda path: path.write_bytes(content))
        return self._names[key]

    def beside(self, path: Path) -> Path:
        """Where to write a file that becomes `path` at the end, if all goes well."""
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return self._files.enter_context(replacing(path, shared=True))

    def remove(self, path: Path) -> None:
        """Remove `path` at the end, if all goes well."""
        self._files.push(lambda kind, *_: None if kind else path.unlink(missing_ok=True))

    def sync(self) -> None:
        """Bring rows and images to disk, and the images under their final names."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        staged = list(self._staging.iterdir())
        if not staged:
            return
        os.sync()  # all images at once: an fsync for each would take most of the time
        self._images.mkdir(exist_ok=True)
        for path in staged:
            os.replace(path, self._images / path.name)
            self._moved.append(self._images / path.name)
        fsync(self._images)

    def _undo(self) -> None:
        for path in self._moved:
            path.unlink(missing_ok=True)
        if self._images.is_dir() and not any(self._images.iterdir()):
            self._images.rmdir()

    def _add(self, name: str, write: Callable[[Path], object]) -> str:
        path = self._staging / name
        if not path.exists() and not (self._images / name).exists():
            with _told(self._images):
                write(path)
        return f"{self._images.name}/{name}"


@contextmanager
def _told(place: Path) -> Iterator[None]:
    """What the disk refuses, as an error of the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or place}: {error.strerror or error}; free space or make its "
                        "folder writable, then repeat the command") from error


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
