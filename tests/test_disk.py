"""fsync of a file and of a folder, whose handles are closed whatever happens."""

import errno
import os

import pytest

from cosmo_rl.data import disk


def test_the_file_or_folder_itself_is_synced(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    synced = []
    monkeypatch.setattr(disk.os, "fsync", lambda handle: synced.append((handle, os.fstat(handle).st_ino)))
    for path in (tmp_path / "a", tmp_path):
        disk.fsync(path)
        handle, inode = synced[-1]
        assert inode == path.stat().st_ino
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


def test_an_error_is_passed_on_and_leaves_no_handle(tmp_path, monkeypatch):
    handles = []

    def full(handle):
        handles.append(handle)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        disk.fsync(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])
