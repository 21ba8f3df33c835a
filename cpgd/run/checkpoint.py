"""Checkpoints that survive a kill at any moment: safetensors shards by torch.distributed.checkpoint, the rest JSON.

    checkpoints/step-000050/shard-*.safetensors   one a rank: model.NAME, exp_avg.NAME, exp_avg_sq.NAME
    checkpoints/step-000050/state.json            step, the trainer's state, optimizer steps, RNG of each rank, versions
    checkpoints/step-000050/manifest.json         size and CRC-32 of every other file
    checkpoints/latest                            name of the checkpoint to resume from
    checkpoints/damaged-000050                    one that was found damaged, set aside

A checkpoint is written as .tmp-000050, brought to disk and renamed; `latest` is replaced last. Weights that are not
finite are never written. Where the latest one is damaged, the run goes on from the newest whole one before it, with a
warning: metrics are cut back to it, and what follows is what followed before. One that cannot be read (rights, a lost
disk) may be whole, so that is an error.

A checkpoint loads on any number of ranks. The folder must be one that all ranks see. No pickle is read or written:
DCP's default storage keeps its `.metadata` as one, so the Hugging Face storage of DCP is used, which has none.
"""

import base64
import json
import logging
import math
import random
import re
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from cosmo_rl.data.disk import move, remove, replace_file
from cosmo_rl.data.errors import UserError
from cosmo_rl.model.parallel import on_main, rank, together, world

logger = logging.getLogger(__name__)
T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = {"iteration": int, "skipped_in_row": int, "trained_s": float | int, "sampler": dict, "guard": dict | None,
         "watch": dict | None, "rows_fingerprint": str, "model_fingerprint": str}
"""What a resume needs of the trainer's state. A `fingerprint`, as older versions wrote, was made of the rows in another
way: that it differs would not say that they have changed."""
_NAME = re.compile("step-[0-9]{6,15}")
_LONGEST_NAME = 80
"""Bytes read of `latest`, which a user may have written."""


def save(folder: str | Path, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer, state: dict,
         keep: int) -> Path:
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
        UserError: on every rank, when any rank cannot write (disk full, permissions), or when a weight or moment is
            not finite. Earlier checkpoints are kept.
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

    tensors, optimizer_steps = _tensors(policy, optimizer)
    if bad := _not_finite(tensors, policy):
        raise UserError(
            f"{bad} is not finite after step {step}: no checkpoint of it is written, and earlier ones in {folder} are "
            "kept; the same settings lead here again, so start in another --run-dir with a lower learning rate "
            "(--optim.learning-rate)")
    try:
        attempt(lambda: _prepare(folder, temp), main_only=True)
        attempt(lambda: _write_shards(tensors, temp))
        sums = attempt(lambda: _checksums(_share(sorted(temp.glob("*.safetensors")))))
        versions = {name: version(name) for name in ("torch", "transformers", "numpy")} | {"python": sys.version}
        rest = {"step": step, "state": state, "optimizer_steps": optimizer_steps, "rng": together(_rng_state),
                "versions": versions}
        manifest = {name: entry for part in sums if part for name, entry in part.items()}
        attempt(lambda: _commit(temp, target, rest, manifest), main_only=True)
    except UserError:
        if rank() == 0:
            remove(temp)
        raise
    if rank() == 0:
        # A number above this step was left by a run that was then taken back to an earlier checkpoint.
        kept = [path for path in _complete(folder) if _step(path) <= step][-keep:]
        for path in _complete(folder):
            if path not in kept:
                remove(path)  # tried again after the next one, if it cannot be
    return target


def load_latest(folder: str | Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Fill policy, optimizer and RNG from the latest whole checkpoint; all ranks must call it together.

    The number of ranks may differ from the one that saved; a rank that had no RNG state then keeps its own. A damaged
    checkpoint is set aside, with a warning, and the newest whole one before it is taken.
    Returns:
        {"step": int, **state} as given to `save`, or None when there is no checkpoint.
    Raises:
        UserError: on every rank, when no whole checkpoint is left, `latest` names none, a file cannot be read, or the
            checkpoint does not fit the policy.
    """
    path = _newest_whole(Path(folder))
    if path is None:
        return None
    saved = json.loads((path / "state.json").read_bytes())
    tensors = _targets(path, policy, optimizer, saved["optimizer_steps"])
    try:
        dcp_load(tensors, storage_reader=HuggingFaceStorageReader(path=str(path)))
    except CheckpointException as error:  # a BaseException, raised on all ranks
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise UserError(_does_not_fit(path, causes)) from None
    if bad := _not_finite(tensors, policy):
        raise UserError(f"{bad} in {path} is not finite: {_mend(path.parent, path.name)}")
    together(lambda: _restore_rng(path, saved["rng"]))
    return {**saved["state"], "step": saved["step"]}


def check_state(state: Mapping[str, Any], folder: Path, *, steps: int, fingerprint: str, model_fingerprint: str,
                model_files: str) -> None:
    """That a run can go on from `state`, of `load_latest`, with the data, model and steps that it has now.

    Args:
        folder: that the checkpoint is in.
        model_files: that `model_fingerprint` is of, to be told.
    Raises:
        UserError: a part is missing or of another kind, the data or the model folder changed, or more steps are done.
    """
    if wrong := [name for name, kind in STATE.items() if not isinstance(state.get(name), kind)]:
        raise _other_version(folder, ", ".join(wrong))
    saved = f"the checkpoint in {folder} was made with fingerprint"
    if state["rows_fingerprint"] != fingerprint:
        raise UserError(f"the data changed: {saved} {state['rows_fingerprint']}, the rows now have {fingerprint}; "
                        "restore the data or give another --run-dir")
    if state["model_fingerprint"] != model_fingerprint:
        raise UserError(f"the model folder changed: {saved} {state['model_fingerprint']}, {model_files} now have "
                        f"{model_fingerprint}; restore them or give another --run-dir")
    if state["step"] > steps:
        raise UserError(f"--steps is {steps}, and step {state['step']} is done in {folder}; give at least "
                        f"{state['step']}, or another --run-dir")


def restore(state: Mapping[str, Any], folder: Path, **parts: Any) -> None:
    """Give each part its own of `state`, by its name: its `load_state_dict` looks into it.

    Raises:
        UserError: it is not as this version writes it.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state.get(name))
        except (KeyError, TypeError, AttributeError) as error:
            raise _other_version(folder, name) from error


def _other_version(folder: Path, names: str) -> UserError:
    return UserError(f"state.json of the checkpoint in {folder} is without {names} as this version writes it: continue "
                     "with the version that wrote it, or give another --run-dir")


def _newest_whole(folder: Path) -> Path | None:
    """The checkpoint that `latest` names or, where that is damaged, the newest whole one before it; None: none yet."""
    path = together(lambda: None if rank() else _latest(folder))[0]
    damaged: dict[Path, str] = {}
    while path is not None and (problem := next(filter(None, together(partial(_damage, path))), None)):
        damaged[path] = problem
        path = together(partial(_before, path))[0]
    if path is None and damaged:
        raise UserError(f"no whole checkpoint is left: {'; '.join(damaged.values())}: "
                        + _mend(folder, *(old.name for old in damaged)))
    if path is not None and damaged:
        on_main(partial(_set_aside, damaged, path))
    return path


def _before(path: Path) -> Path | None:
    """On rank 0 the newest checkpoint with fewer steps."""
    earlier = [] if rank() else [other for other in _complete(path.parent) if _step(other) < _step(path)]
    return earlier[-1] if earlier else None


def _set_aside(damaged: dict[Path, str], path: Path) -> None:
    """Continue from `path` in later starts too; rename the damaged ones, which the next save would remove."""
    replace_file(path.parent / "latest", path.name + "\n")
    for old, problem in damaged.items():
        names = (old.with_name(f"damaged-{_step(old):06d}" + (f"-{n}" if n else "")) for n in count())
        aside = next(name for name in names if not name.exists())
        old.rename(aside)
        logger.warning("%s; set aside as %s", problem, aside)
    logger.warning("CONTINUING FROM %s INSTEAD: the steps after it are done again. To use the other once it is mended, "
                   "stop this run, rename it back and write its name into %s", path, path.parent / "latest")


def _tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
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


def _targets(path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer,
             steps: dict[str, float]) -> dict[str, torch.Tensor]:
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
    for left in (*folder.glob(".tmp-*"), *folder.glob(".step-*")):  # of a run killed while it saved
        remove(left)
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
    move(temp, target)
    replace_file(target.parent / "latest", target.name + "\n")


def _share(items: list[T]) -> list[T]:
    """This rank's part of a list that is equal on all ranks."""
    return items[rank() :: world()]


def _checksums(paths: list[Path]) -> dict[str, dict[str, int]]:
    out = {}
    for path in paths:
        crc = 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                crc = zlib.crc32(chunk, crc)
        out[path.name] = {"bytes": path.stat().st_size, "crc32": crc}
    return out


def _damage(path: Path) -> str | None:
    """What is wrong with the part of checkpoint `path` that falls to this rank; None: nothing.

    Raises:
        UserError: a file is there and cannot be read.
    """
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        names = manifest.keys() if isinstance(manifest, dict) else set()
        if "state.json" not in names or not any(name.endswith(".safetensors") for name in names):
            return f"{file} is damaged: it does not list state.json and shards"
        if strange := [name for name in names if not re.fullmatch(r"state\.json|\w[\w.-]*\.safetensors", name)]:
            return f"{file} is damaged: it lists {strange[0][:80]!r}, which is no file of a checkpoint"
        # the reader takes every shard that lies there, and of two with one tensor the last
        if more := sorted({shard.name for shard in path.glob("*.safetensors")} - names):
            return f"{path / more[0]} is not listed in its manifest.json"
        for name in _share(sorted(names)):
            file = path / name
            if not (file.is_file() or not file.exists()) or _checksums([file])[name] != manifest[name]:
                return f"{file} is damaged"
        file = path / "state.json"
        if problem := _misshapen(json.loads(file.read_bytes()), _step(path)):
            return f"{file} is damaged: {problem}"
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; make it readable, or "
                        + _mend(path.parent, path.name)) from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return f"{file} is damaged: {error}"
    return None


def _misshapen(saved: object, step: int) -> str | None:
    """What of a state.json is not as `save` writes it; the RNG states are judged by the generators."""
    kinds = {"step": int, "state": dict, "optimizer_steps": dict, "rng": list}
    if not isinstance(saved, dict):
        return "it is no object"
    for name, kind in kinds.items():
        if type(saved.get(name)) is not kind:
            return f"its `{name}` is {type(saved.get(name)).__name__}, not {kind.__name__}"
    if saved["step"] != step:
        return f"its step is {saved['step']}"
    if not all(type(count) is float and 0 <= count < math.inf for count in saved["optimizer_steps"].values()):
        return "its `optimizer_steps` are no counts"
    return None


def _not_finite(tensors: dict[str, torch.Tensor], policy: nn.Module) -> str | None:
    """A trained weight or a moment with NaN or infinity on any rank, the same on all; None: all are finite."""
    frozen = {f"model.{name}" for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    names = [name for name in tensors if name not in frozen and tensors[name].is_floating_point()]
    parts = [tensors[name] for name in names]
    finite = [(p.to_local() if isinstance(p, DTensor) else p).isfinite().all() for p in parts]
    here = torch.stack(finite).logical_not().nonzero().flatten().tolist()[:1] if names else []
    return next((names[found[0]] for found in together(lambda: here) if found), None)


def _complete(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _latest(folder: Path) -> Path | None:
    """The checkpoint to resume from; a run killed before the first `latest` left at most one complete folder."""
    pointer = folder / "latest"
    if not pointer.exists() and not pointer.is_symlink():
        complete = _complete(folder)
        return complete[-1] if complete else None
    try:
        content = b""
        if pointer.is_file():  # of a pipe the end might never come
            with pointer.open("rb") as file:
                content = file.read(_LONGEST_NAME)
    except OSError as error:
        raise UserError(f"cannot read {pointer}: {error.strerror}; make it readable") from error
    name = content.decode("utf-8", "replace").strip()
    path = folder / name
    if not _NAME.fullmatch(name) or not path.is_dir():
        raise UserError(f"{pointer} names {name!r}, which is not there: {_mend(folder, name)}")
    return path


def _mend(folder: Path, *without: str) -> str:
    """How to go on without these checkpoints."""
    others = [path.name for path in _complete(folder) if path.name not in without]
    if others:
        command = f"echo {others[-1]} > {shlex.quote(str(folder / 'latest'))}"
        return f"restore it, or continue from {others[-1]}: {command}"
    return f"restore it, or remove {folder.parent} to start the stage again"


def _does_not_fit(path: Path, problem: str) -> str:
    return f"checkpoint {path} does not fit this model: {problem}; use the --model.path it was trained from"


def _cannot_write(target: Path, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(target.parent).free / 1e6:.0f} MB free"
    except OSError:
        free = "free space unknown"
    return (f"cannot write checkpoint {target}: {error.strerror or error} ({free}); free space or make the folder "
            "writable, then repeat the command: earlier checkpoints are kept")


def _rng_state() -> dict:
    """This rank's global generators, JSON-ready."""
    kind, keys, *rest = np.random.get_state()
    encode = lambda state: base64.b64encode(state.numpy().tobytes()).decode()
    return {"torch": encode(torch.get_rng_state()),
            "cuda": encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
            "numpy": [kind, np.asarray(keys).tolist(), *rest], "python": random.getstate()}


def _restore_rng(path: Path, states: list[dict]) -> None:
    """This rank's generators as they were; a rank that saved none keeps its own."""
    decode = lambda text: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    if rank() >= len(states):
        return
    try:
        state = states[rank()]
        torch.set_rng_state(decode(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(decode(state["cuda"]))
        np.random.set_state(tuple(state["numpy"]))
        kind, keys, gauss = state["python"]
        random.setstate((kind, tuple(keys), gauss))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path / 'state.json'} is damaged: the generators refuse its `rng` ({error}); "
                        + _mend(path.parent, path.name)) from error
