"""Endpoint attacks on many rows: the model is asked about all of them, many at a time, before any row is written.

A unit (a row and its twins) is settled when each of its rows has a usable reply. One that has none drops the unit, with
its reason; then, as a model declines unsafe requests more often than benign ones, others are left out too, so that each
attack still meets unsafe and benign rows in the shares that were dealt. Else the attack would tell the label.

Every reply lies in the endpoint's disk cache by its question, model, seed and sampling, those that will not do among
them: the same command again asks nothing and writes the same bytes, and one that was stopped goes on where it was.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

from cosmo_rl.cpgd.judges.client import Endpoint, EndpointDown, EndpointError, Rejected
from cosmo_rl.cpgd.judges.loop import LoopThread
from cosmo_rl.cpgd.judges.spec import Server

from ...schema import Row
from .registry import AttackerModel, Params, Question, Unfit
from .rows import MAX_IMAGE_PIXELS, Assignment, AttackerReplies, attack_row

MAX_FAILED = 8
"""Calls that fail for good, one after the other, before the run stops; a single one drops its unit."""


class Model:
    """A model behind an endpoint, to be asked from several threads. A context manager; leaving it gives calls up."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self._loop = endpoint, LoopThread()
        self.answered = 0
        """Calls that ended in a reply, cached ones included."""
        self.last_error: EndpointError | None = None
        self._failed, self._lock, self._closed = 0, threading.Lock(), False

    @property
    def model(self) -> str:
        return self.endpoint.model

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        with self._lock:
            self._closed = True
        self._loop.close(self.endpoint.aclose)

    def __call__(self, question: Question) -> str:
        """The reply.

        Raises:
            Unfit: the server refuses this request, or answers none of its attempts.
            EndpointError: it answers none of MAX_FAILED calls in a row; EndpointDown: it is dead, or has no such model.
        """
        content: Any = question.prompt
        if question.pictures:
            content = [*({"type": "image", "image": picture} for picture in question.pictures),
                       {"type": "text", "text": question.prompt}]
        with self._lock:  # a call submitted to a closed loop would never end, nor its thread
            if self._closed:
                raise CancelledError
            call = self._loop.submit(self.endpoint.chat(
                [{"role": "user", "content": content}], max_tokens=question.max_tokens, seed=question.seed,
                temperature=question.temperature, prompt_hash=question.version))
        try:
            reply = call.result()
        except Rejected as error:
            raise Unfit("the server refuses the request", str(error)) from error
        except EndpointError as error:
            with self._lock:
                self._failed, self.last_error = self._failed + 1, error
                if isinstance(error, EndpointDown) or self._failed >= MAX_FAILED:
                    raise
            raise Unfit("the call failed", str(error)) from error
        with self._lock:
            self._failed, self.answered = 0, self.answered + 1
        return reply.text


class Tape:
    """Asks `model` where `heard` has no reply left, and keeps all replies."""

    def __init__(self, ask: AttackerModel, heard: Sequence[str] = ()) -> None:
        self.model, self.replies = ask.model, []
        self._ask, self._heard = ask, list(heard)

    def __call__(self, question: Question) -> str:
        self.replies.append(self._heard.pop(0) if self._heard else self._ask(question))
        return self.replies[-1]


def open_model(server: Server, cache_dir: str | Path, *, max_pixels: int) -> Model:
    """The Model of a server, with the disk cache in `cache_dir`, and pictures shrunk to `max_pixels` (width x height).

    Raises:
        UserError: its key variable holds no key, or the cache cannot be written.
    """
    return Model(Endpoint(server.url, server.model, cache_dir=cache_dir, max_pixels=max_pixels, verify_first=True,
                          **server.options))


def settle(rows: Sequence[Row], units: Sequence[Assignment], model: Model, *, seed: int,
           params: Mapping[str, Params] | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS,
           done: Callable[[], object] = lambda: None) -> dict[tuple[str, str], AttackerReplies]:
    """What the model says about every unit of an endpoint attack, by (key, attack), for `augment`.

    Args:
        units: all of a run; those of offline attacks are left aside.
        seed, params, max_image_pixels: as in `augment`.
        done: called after each unit.
    Raises:
        EndpointError: the server is dead, has no such model, or fails call after call; what it answered is cached.
    """
    asked = [unit for unit in units if unit.attack.family == "endpoint"]
    out: dict[tuple[str, str], AttackerReplies] = {}
    pool = ThreadPoolExecutor(model.endpoint.max_in_flight, thread_name_prefix="asking")
    try:
        one = lambda unit: _settle(rows, unit, model, seed, (params or {}).get(unit.attack.name, {}), max_image_pixels)
        futures = {pool.submit(one, unit): unit for unit in asked}
        for future in as_completed(futures):
            unit = futures[future]
            out[unit.key, unit.attack.name] = future.result()
            done()
        if model.last_error and not model.answered:
            raise model.last_error
    except EndpointError as error:
        raise type(error)(f"{error}; the {model.answered} replies so far are kept, and the same command goes on from "
                          "them") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return _balanced(rows, asked, out)


def _settle(rows: Sequence[Row], unit: Assignment, model: Model, seed: int, params: Params, max_image_pixels: int,
            ) -> AttackerReplies:
    heard: list[list[str]] = [[] for _ in unit.rows]
    made: Params = {}

    def attacked(number: int) -> Params:
        tape = Tape(model, heard[number])
        try:
            row = attack_row(rows[unit.rows[number]], unit.attack.name, params={**params, **made}, key=unit.key,
                             seed=unit.seed(seed), max_image_pixels=max_image_pixels, ask=tape)
        finally:
            heard[number] = tape.replies
        assert row.attack is not None
        return row.attack["params"]

    try:
        noted = [attacked(number) for number in range(len(unit.rows))]
        places = {note.get("place") for note in noted}
        if len(places) > 1:
            # A twin whose picture does not show its element has it on a page: so have all, or the page tells the label.
            made = {"place": "page"}
            noted = [attacked(number) for number in range(len(unit.rows))]
        assert all(note == noted[0] for note in noted), noted
    except Unfit as error:
        return AttackerReplies(model.model, dropped=error)
    return AttackerReplies(model.model, made, tuple(map(tuple, heard)))


def _balanced(rows: Sequence[Row], units: Sequence[Assignment], settled: dict[tuple[str, str], AttackerReplies],
              ) -> dict[tuple[str, str], AttackerReplies]:
    """Of each attack the same share of the units of each label is kept, to the nearest unit."""
    groups: dict[str, dict[tuple[bool, ...], list[Assignment]]] = {}
    for unit in units:
        labels = tuple(sorted(rows[place].is_unsafe for place in unit.rows))
        groups.setdefault(unit.attack.name, {}).setdefault(labels, []).append(unit)
    out = dict(settled)
    rank = lambda unit: blake2b(f"{unit.attack.name}\0balance\0{unit.key}".encode(), digest_size=8).digest()
    for name, by_labels in groups.items():
        kept = {labels: [unit for unit in own if not out[unit.key, name].dropped] for labels, own in by_labels.items()}
        fewest = min(kept, key=lambda labels: len(kept[labels]) / len(by_labels[labels]))
        left, dealt = len(kept[fewest]), len(by_labels[fewest])
        for labels, own in by_labels.items():
            number = (2 * len(own) * left + dealt) // (2 * dealt)
            for unit in sorted(kept[labels], key=rank)[number:]:
                out[unit.key, name] = AttackerReplies(out[unit.key, name].model, dropped=Unfit(
                    "left out, for rows of another label were dropped more often", "see their reasons",
                    f"row {rows[unit.rows[0]].id}, attack {name}"))
    return out
