"""Bringing what was written to disk, where a crash cannot undo it."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
