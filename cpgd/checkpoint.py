"""Checkpoints that survive a kill at any moment: safetensors shards by torch.distributed.checkpoint, the rest JSON.

    checkpoints/step-000050/shard-*.safetensors   one a rank: model.NAME, exp_avg.NAME, exp_avg_sq.NAME
    checkpoints/step-000050/state.json            step, the trainer's state, optimizer steps, RNG of each rank, versions
    checkpoints/step-000050/manifest.json         size and CRC-32 of every other file
    checkpoints/latest                            name of the checkpoint to resume from

A checkpoint is written as .tmp-000050, brought to disk and renamed; `latest` is replaced last. It loads on any number
of ranks. The folder must be one that all ranks see. No pickle is read or written: DCP's default storage keeps its
`.metadata` as one, so the Hugging Face storage of DCP is used, which has none.
"""

import base64
import json
import random
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from cosmo_rl.data.disk import fsync
from cosmo_rl.data.errors import UserError
from cosmo_rl.model.parallel import rank, world

from .rundir import together, write_atomic

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    folder: str | Path, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep: int
) -> Path:
    """Write checkpoint `step` and drop all but the newest `keep`; all ranks must call it together.

    Args:
        folder: the stage's checkpoints/ folder, seen by all ranks.
        step: optimizer steps done.
        policy: the FSDP2 root (or any module); parameters may be tied.
        optimizer: AdamW over its parameters.
        state: JSON-ready, equal on all ranks: scheduler, sampler, config hash, data fingerprint and the like.
        keep: checkpoints kept, at least 1.
    Returns:
        The checkpoint's folder. A step that `latest` names already is not written again.
    Raises:
        UserError: on every rank, when any rank cannot write (disk full, permissions). Earlier checkpoints are kept.
    """
    folder = Path(folder)
    target, temp = folder / f"step-{step:06d}", folder / f".tmp-{step:06d}"
    if together(lambda: rank() == 0 and _latest(folder) == target)[0]:
        return target

    def attempt(action: Callable[[], T], main_only: bool = False) -> list[T | None]:
        def guarded() -> T | None:
            try:
                return None if main_only and rank() else action()
            except OSError as error:
                raise UserError(_cannot_write(target, error)) from error

        return together(guarded)

    try:
        attempt(lambda: _prepare(folder, temp), main_only=True)
        tensors, optimizer_steps = _tensors(policy, optimizer)
        attempt(lambda: _write_shards(tensors, temp))
        sums = attempt(lambda: _checksums(_share(sorted(temp.glob("*.safetensors")))))
        rest = {
            "step": step,
            "state": state,
            "optimizer_steps": optimizer_steps,
            "rng": together(_rng_state),
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy")} | {"python": sys.version},
        }
        manifest = {name: entry for part in sums if part for name, entry in part.items()}
        attempt(lambda: _commit(temp, target, rest, manifest), main_only=True)
    except UserError:
        if rank() == 0:
            shutil.rmtree(temp, ignore_errors=True)
        raise
    if rank() == 0:
        # A number above this step was left by a run that was then taken back to an earlier checkpoint.
        kept = [path for path in _complete(folder) if _step(path) <= step][-keep:]
        for path in _complete(folder):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
    return target


def load_latest(folder: str | Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Fill policy, optimizer and RNG from the latest checkpoint; all ranks must call it together.

    The number of ranks may differ from the one that saved; a rank that had no RNG state then keeps its own.
    Returns:
        {"step": int, **state} as given to `save`, or None when there is no checkpoint.
    Raises:
        UserError: on every rank, when the checkpoint misses a file, is damaged, or does not fit the policy.
    """
    folder = Path(folder)
    path = together(lambda: None if rank() else _latest(folder))[0]
    if path is None:
        return None
    together(lambda: _verify(path))
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = _targets(path, policy, optimizer, saved["optimizer_steps"])
    try:
        dcp_load(tensors, storage_reader=HuggingFaceStorageReader(path=str(path)))
    except CheckpointException as error:  # a BaseException, raised on all ranks
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise UserError(_does_not_fit(path, causes)) from None
    if rank() < len(saved["rng"]):
        _set_rng_state(saved["rng"][rank()])
    return {**saved["state"], "step": saved["step"]}


def _tensors(
    policy: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Flat tensors under model.*, exp_avg.*, exp_avg_sq.* and AdamW's step count of each parameter."""
    weights = policy.state_dict()  # FSDP2 reshards first: named_parameters() is right only after this
    names = [name for name, _ in chain(policy.named_parameters(), policy.named_buffers()) if name in weights]
    tensors = {f"model.{name}": weights[name] for name in names}  # a tied weight once, under its first name
    steps = {}
    for name, parameter in policy.named_parameters():
        if parameter in optimizer.state:
            values = optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": values[moment] for moment in MOMENTS}
            steps[name] = float(values["step"])
    return tensors, steps


def _targets(
    path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, steps: dict[str, float]
) -> dict[str, torch.Tensor]:
    """The live tensors to be read into, with AdamW's state made anew and its step counts set."""
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    if steps:
        get_optimizer_state_dict(policy, optimizer)  # called because it makes the missing state
        for name, parameter in policy.named_parameters():
            if name in steps and parameter in optimizer.state:
                optimizer.state[parameter]["step"].fill_(steps[name])
            else:
                optimizer.state.pop(parameter, None)
    tensors, present = _tensors(policy, optimizer)
    if missing := steps.keys() - present.keys():
        raise UserError(_does_not_fit(path, f"it has no trained parameter {min(missing)}"))
    return tensors


def _prepare(folder: Path, temp: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".tmp-*"):  # of a run killed while it saved
        shutil.rmtree(left)
    temp.mkdir()


def _write_shards(tensors: dict[str, torch.Tensor], temp: Path) -> None:
    try:
        dcp_save(tensors, storage_writer=HuggingFaceStorageWriter(path=str(temp), save_distributed=True))
    except CheckpointException as error:  # a BaseException, raised on all ranks
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise cause from None
        raise RuntimeError(str(error)) from None


def _commit(temp: Path, target: Path, rest: dict, manifest: dict) -> None:
    (temp / "state.json").write_text(json.dumps(rest), encoding="utf-8")
    manifest |= _checksums([temp / "state.json"])
    (temp / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in temp.iterdir():
        fsync(path)
    fsync(temp)
    if target.exists():  # not the latest, see save
        shutil.rmtree(target)
    temp.rename(target)
    fsync(target.parent)
    write_atomic(target.parent / "latest", target.name + "\n")


def _share(paths: list[Path]) -> list[Path]:
    """This rank's part of a list that is equal on all ranks."""
    return paths[rank() :: world()]


def _checksums(paths: list[Path]) -> dict[str, dict[str, int]]:
    out = {}
    for path in paths:
        crc = 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                crc = zlib.crc32(chunk, crc)
        out[path.name] = {"bytes": path.stat().st_size, "crc32": crc}
    return out


def _verify(path: Path) -> None:
    """Raise UserError unless the files that fall to this rank are there and whole."""
    mend = _mend(path.parent, path.name)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for file in _share([path / name for name in sorted(manifest)]):
            if _checksums([file])[file.name] != manifest[file.name]:
                raise UserError(f"{file} is damaged: {mend}")
    except FileNotFoundError as error:
        raise UserError(f"checkpoint file {error.filename} is missing: {mend}") from error
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; {mend}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / 'manifest.json'} is damaged: {mend}") from error


def _complete(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _latest(folder: Path) -> Path | None:
    """The checkpoint to resume from; a run killed before the first `latest` left at most one complete folder."""
    pointer = folder / "latest"
    if not pointer.exists():
        complete = _complete(folder)
        return complete[-1] if complete else None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    path = folder / name
    if not re.fullmatch(r"step-\d+", name) or not path.is_dir():
        raise UserError(f"{pointer} names {name!r}, which is not there: {_mend(folder, name)}")
    return path


def _mend(folder: Path, without: str) -> str:
    """How to go on without checkpoint `without`."""
    others = [path.name for path in _complete(folder) if path.name != without]
    if others:
        return f"restore it, or continue from {others[-1]} by writing that name into {folder / 'latest'}"
    return f"restore it, or remove {folder.parent} to start the stage again"


def _does_not_fit(path: Path, problem: str) -> str:
    return f"checkpoint {path} does not fit this model: {problem}; use the --model.path it was trained from"


def _cannot_write(target: Path, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(target.parent).free / 1e6:.0f} MB free"
    except OSError:
        free = "free space unknown"
    return (
        f"cannot write checkpoint {target}: {error.strerror or error} ({free}); free space or make the folder "
        "writable, then repeat the command: earlier checkpoints are kept"
    )


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _rng_state() -> dict:
    """This rank's global generators, JSON-ready."""
    kind, keys, *rest = np.random.get_state()
    cuda = _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": cuda,
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def _set_rng_state(state: dict) -> None:
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))
    np.random.set_state(tuple(state["numpy"]))
    kind, keys, gauss = state["python"]
    random.setstate((kind, tuple(keys), gauss))
