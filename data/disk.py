"""Files and folders that hold the old content or the new one after a crash, never a part of either."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, a text in UTF-8.

    Raises:
        UserError: it cannot be written (disk full, permissions).
    """
    try:
        with replacing(path) as beside:
            beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or make its folder writable, then "
                        "repeat the command") from error


@contextmanager
def replacing(path: Path, *, shared: bool = False, sync: bool = True) -> Iterator[Path]:
    """The name beside `path` at which the block writes a file or a folder, to take the place of `path` at its end.

    Args:
        shared: others may write the same `path` at the same time: the name is nobody else's.
        sync: bring it to disk; without, a crash of the machine may leave an empty file.
    Raises:
        OSError: of the block, or it cannot be moved; `path` is then as it was, and nothing lies beside it.
    """
    beside = path.with_name(f".{path.name}.{f'{os.getpid()}.{secrets.token_hex(4)}' if shared else 'tmp'}")
    aside = _aside(path)
    if os.path.lexists(aside) and not os.path.lexists(path):
        aside.rename(path)  # killed within `move`: the only whole copy
    for leftover in (beside, aside):
        remove(leftover)
    try:
        yield beside
        move(beside, path, sync=sync)
    finally:
        remove(beside)


def move(new: Path, path: Path, *, sync: bool = True) -> None:
    """Put `new`, a file or a folder of files, in the place of `path`, which may be there; both are on one disk.

    A folder that is there is renamed, and removed last.
    """
    if sync:
        for part in (*new.iterdir(), new) if new.is_dir() else (new,):
            fsync(part)
    aside = _aside(path)
    if new.is_dir() and os.path.lexists(path):
        path.rename(aside)
    try:
        new.replace(path)
    except OSError:
        if os.path.lexists(aside) and not os.path.lexists(path):
            aside.rename(path)
        raise
    if sync:
        fsync(path.parent)
    remove(aside)


def fsync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
