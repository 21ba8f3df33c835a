"""The run directory: one folder a stage, held by one run at a time, and workers that die with their launcher.

    RUN/.lock               flock of the run that works here; pid and host inside
    RUN/stage2/             config.json, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, hf/,
                            report.html, report.json; warnings.jsonl, where there was a warning

`report.json` is written last of all: a stage that has one is finished.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path

from cosmo_rl.data.disk import replace_file
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.terminal import shortened
from cosmo_rl.model.parallel import rank, together

from ..config import Config, identity

logger = logging.getLogger(__name__)
ABSENT = "(absent)"
LONGEST_VALUE = 150
"""Characters of a setting in a message: of two system prompts the mend must still be in torchrun's line."""


def _flat(nested: dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _differences(theirs: dict[str, object], ours: dict[str, object]) -> list[tuple[str, str, str]]:
    """(name, value there, value here) of what is not the same, to be shown."""
    pairs = [(name, theirs.get(name, ABSENT), ours.get(name, ABSENT)) for name in sorted(theirs.keys() | ours.keys())]
    return [(name, shortened(repr(there), LONGEST_VALUE), shortened(repr(here), LONGEST_VALUE))
            for name, there, here in pairs if there != here]


class RunDir:
    """A run's folders, locked. All ranks construct it together; rank 0 looks and its verdict holds for all.

    Args:
        path: run directory; empty: runs/PRESET.
        stage: 0, 1 or 2.
        config: the stage's resolved settings; written to config.json of a new stage.
        resume: "auto" or "never".
        wait_s: how long to wait for the lock, in seconds (a killed run's workers need a moment to die).
    Raises:
        UserError: on every rank, when the folder cannot be written, is held by another run, is not empty under
            "never", belongs to a run with other settings that has trained (all of them named, with both values), or is
            finished after another number of steps.
    """

    def __init__(self, path: str | Path, stage: int, config: Config, resume: str = "auto", *,
                 wait_s: float = 15.0) -> None:
        self.path = Path(path or Path("runs") / config.preset)
        self.stage_dir = self.path / f"stage{stage}"
        self.checkpoints = self.stage_dir / "checkpoints"
        self.hf = self.stage_dir / "hf"
        self.changed: list[str] = []
        """What a resumed run may change and has changed, as "steps 8 -> 12"; known to rank 0 only."""
        self._lock: int | None = None
        self.finished: bool = together(lambda: rank() == 0 and self._open(config, resume, wait_s))[0]
        """The stage has its report: nothing is left to do."""

    def _open(self, config: Config, resume: str, wait_s: float) -> bool:
        try:
            self.stage_dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._take_lock(wait_s)
            self._claim(config, resume)
            return self._finished(config.steps)
        except OSError as error:
            self.close()
            raise UserError(f"cannot write to run directory {self.path}: {error.strerror or error}; make it writable "
                            "or give another --run-dir") from error
        except UserError:
            self.close()
            raise

    def _finished(self, steps: int) -> bool:
        report = self.stage_dir / "report.json"
        if not report.exists():
            return False
        try:
            done = json.loads(report.read_text(encoding="utf-8")).get("steps", steps)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{report} is damaged ({error}); restore it, or remove it to have it made anew") from error
        if done != steps:
            raise UserError(f"{self.stage_dir} is finished after {done} steps, and --steps is {steps}; give --steps "
                            f"{done} to see its table, or train on from its result with another --run-dir and "
                            f"--model.path {self.hf}")
        return True

    def adopt(self, config: Config) -> None:
        """Keep what `changed` names in config.json, and say so; on rank 0, once the run goes on."""
        if not self.changed:
            return
        self._write(config)
        falls = any(text.startswith("steps ") for text in self.changed)
        logger.info("settings changed since the last start: %s%s", ", ".join(self.changed),
                    f"; the learning rate now falls to step {config.steps}" if falls else "")

    def _write(self, config: Config) -> None:
        replace_file(self.stage_dir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")

    def _take_lock(self, wait_s: float) -> None:
        assert self._lock is not None
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip() or "another process"
                raise UserError(f"run directory {self.path} is in use by {holder} (waited {wait_s:g} s); wait for "
                                "that run, stop it, or give another --run-dir") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _claim(self, config: Config, resume: str) -> None:
        present = sorted(entry.name for entry in self.stage_dir.iterdir() if not entry.name.startswith("."))
        saved = self.stage_dir / "config.json"
        if resume == "never" and present:
            raise UserError(f"--resume never: {self.stage_dir} is not empty ({', '.join(present[:5])}); give another "
                            "--run-dir, remove the folder, or continue it with --resume auto")
        if not present:
            return self._write(config)
        if not saved.exists():
            raise UserError(f"{self.stage_dir} is not empty ({', '.join(present[:5])}) and has no config.json, so no "
                            "run can be continued there; give another --run-dir or remove the folder")
        try:
            before = json.loads(saved.read_text(encoding="utf-8"))
            all_theirs, theirs = _flat(before), _flat(identity(before))  # the latter changes it
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or no such settings
            raise UserError(f"{saved} is damaged ({error}); restore it or give another --run-dir") from error
        differing = [f"{name} is {there} there and {here} here"
                     for name, there, here in _differences(theirs, _flat(config.identity()))]
        if self._untrained():
            if differing:
                shutil.rmtree(self.stage_dir / "init", ignore_errors=True)
                (self.stage_dir / "before.json").unlink(missing_ok=True)
            self._write(config)
        elif differing:
            raise UserError(f"{self.stage_dir} belongs to a run with other settings: {'; '.join(differing)}. Repeat "
                            "its settings to continue it, give another --run-dir, or remove the folder")
        else:
            self.changed = [f"{name} {there} -> {here}"
                            for name, there, here in _differences(all_theirs, _flat(config.to_dict()))
                            if name not in ("run_dir", "resume")]

    def _untrained(self) -> bool:
        """No step was taken here, as when a first try stopped over bad input: its settings bind nobody."""
        metrics = self.stage_dir / "metrics.jsonl"
        results = (*self.checkpoints.glob("step-*"), self.hf, self.stage_dir / "report.json")
        return not (metrics.exists() and metrics.stat().st_size) and not any(path.exists() for path in results)

    def close(self) -> None:
        """Give the lock back; the end of the process does it too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
