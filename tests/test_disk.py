"""What takes a place on disk takes it whole, whatever happens on the way, and is brought to disk before it does."""

import errno
import os
from pathlib import Path

import pytest

from cosmo_rl.data import disk
from cosmo_rl.data.disk import move, remove, replace_file, replacing
from cosmo_rl.data.errors import UserError


@pytest.fixture
def calls(monkeypatch):
    """Names of what was synced, and renamed to, in order."""
    found, renamed = [], Path.replace
    monkeypatch.setattr(disk, "fsync", lambda path: found.append(f"sync {path.name}"))
    monkeypatch.setattr(Path, "replace", lambda path, to: found.append(f"to {to.name}") or renamed(path, to))
    return found


def full(*_, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "a").write_text(content)
    return path


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
    monkeypatch.setattr(disk.os, "fsync", lambda handle: handles.append(handle) or full())
    with pytest.raises(OSError, match="No space left"):
        disk.fsync(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])


def test_a_file_is_on_disk_before_it_has_the_name(tmp_path, calls):
    path = tmp_path / "state.json"
    for text in ("old", "new \u00e9"):
        replace_file(path, text)
    assert path.read_text(encoding="utf-8") == "new \u00e9" and os.listdir(tmp_path) == ["state.json"]
    assert calls == 2 * ["sync .state.json.tmp", "to state.json", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("patched", [(disk, "fsync"), (Path, "write_bytes"), (Path, "replace")])
def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch, patched):
    path = tmp_path / "state.json"
    replace_file(path, "old")
    monkeypatch.setattr(*patched, full)
    with pytest.raises(UserError, match=r"^cannot write .*state\.json: No space left on device; free space or make"):
        replace_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["state.json"]


def test_writers_of_one_file_do_not_meet(tmp_path, calls):
    with replacing(tmp_path / "a", shared=True, sync=False) as one, replacing(tmp_path / "a", shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one" and os.listdir(tmp_path) == ["a"]
    assert calls == [f"sync {two.name}", "to a", f"sync {tmp_path.name}", "to a"]


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file", "a link"])
def test_a_folder_takes_the_place_of_whatever_is_there(tmp_path, calls, there):
    away = folder(tmp_path / "away", "theirs")
    home = tmp_path / "home"
    home.mkdir()
    path, new = home / "x", folder(home / "new", "new")
    {"nothing": lambda: None, "a folder": lambda: folder(path, "old"), "a file": lambda: path.write_text("old"),
     "a link": lambda: path.symlink_to(away)}[there]()
    move(new, path)
    assert (path / "a").read_text() == "new" and os.listdir(home) == ["x"] and not path.is_symlink()
    assert (away / "a").read_text() == "theirs"
    assert calls == ["sync a", "sync new", "to x", "sync home"]


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path, monkeypatch):
    path = folder(tmp_path / "x", "old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as beside:
        folder(beside, "new")
    assert (path / "a").read_text() == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("killed_before", [True, False], ids=["before the new name", "after it"])
def test_what_a_killed_process_left(tmp_path, killed_before):
    """Between the two renames the old folder is the only whole one: it is put back even if the next try fails too."""
    path = tmp_path / "x"
    folder(tmp_path / ".x.old", "old")
    folder(tmp_path / ".x.tmp", "a part")
    if not killed_before:
        folder(path, "new")
    with pytest.raises(OSError, match="No space left"), replacing(path) as beside:
        assert not beside.exists()
        full()
    assert (path / "a").read_text() == ("old" if killed_before else "new") and os.listdir(tmp_path) == ["x"]


def test_what_cannot_be_removed_stays(tmp_path, monkeypatch):
    kept = folder(tmp_path / "x", "kept")
    monkeypatch.setattr(os, "unlink", full)
    for path in (kept, kept / "a", tmp_path / "absent"):
        remove(path)
    assert (kept / "a").read_text() == "kept"
