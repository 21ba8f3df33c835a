"""Weights of the policy into vLLM servers, and the proof that they are there.

Over vLLM's weight-transfer routes: pause, start, buckets, finish with the version, resume. A bucket is one broadcast in
a group of rank 0 of the run and all workers of all servers: by NCCL where they are on GPUs of their own, else by gloo.
worker/cosmo_rl_worker.py is the other half. Nothing is ever pickled. Then the servers are asked what they hold.
"""

import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from cosmo_rl.data.errors import UserError

from .compare import Comparison
from .control import Control, ServerDown

BUCKET_BYTES = 256 << 20
TIMEOUT_S = 600.0
"""Longest wait for one bucket, and for the group to form."""

Named = tuple[str, torch.Tensor]


class WeightSync:
    """The trainer's half, on rank 0 of the run."""

    def __init__(self, servers: Sequence[Control], device: torch.device, verify_every: int) -> None:
        """
        Args:
            servers: that were met.
            device: where the trainer's weights are.
            verify_every: syncs between comparisons of all tensors.
        """
        self.servers, self.device, self.comparison = servers, device, Comparison(verify_every)
        self._group: Any = None
        self._store: Any = None
        self._members: list[int] = []
        self._groups = 0

    def send(self, weights: Iterable[Named], tag: str) -> None:
        """Send all, compare, and let the servers sample again, by weights `tag`.

        Raises:
            ServerDown: a server has died; call it again when all live.
            WeightsDiffer: a server computes with other weights.
        """
        with ThreadPoolExecutor(len(self.servers)) as pool:
            each = lambda *call: _all([pool.submit(server.post, *call) for server in self.servers])
            try:
                each("/pause")  # aborts what runs, and resets the caches of prefixes, pictures and their features
                new = self._group is None or self._members != [server.born for server in self.servers]
                if new:
                    self._join(pool)
                self.comparison.begin(everything=new)
                each("/start_weight_update")
                self._stream(weights, lambda info: [pool.submit(server.post, "/update_weights", {"update_info": info})
                                                    for server in self.servers])
                each("/finish_weight_update", {"weight_version": tag})
                for server in self.servers:
                    self.comparison.check(server.url, server.rpc("cosmo_digests", self.comparison.names()))
                each("/resume")
            except (ServerDown, UserError) as error:  # before the pool ends: servers may wait in the group
                self.leave()
                traceback.clear_frames(error.__traceback__)  # they hold what was being sent, and so the connections
                dead = [server.url for server in self.servers if not server.alive()]
                if isinstance(error, UserError) and dead:  # a server's complaint that another has died
                    raise ServerDown(f"{dead[0]} has died in a sync ({error})") from error
                raise
        self.comparison.end()

    def leave(self) -> None:
        """Give the group up: its members see their connections close."""
        if self._group is not None and self._staging.type == "cuda":
            self._group.abort()
        self._group = None

    def _join(self, pool: ThreadPoolExecutor) -> None:
        self.leave()
        workers = [worker for server in self.servers for worker in server.workers]
        transport = "gloo"
        if self.device.type == "cuda":  # NCCL has no two ranks on one GPU
            mine = str(torch.cuda.get_device_properties(self.device).uuid)
            transport = "nccl" if all(w["gpu"] not in ("", mine) for w in workers) else "gloo"
        self._staging = self.device if transport == "nccl" else torch.device("cpu")
        timeout, size, self._groups = timedelta(seconds=TIMEOUT_S), 1 + len(workers), self._groups + 1
        host = own_address([server.url for server in self.servers])
        if self._store is None:
            self._store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        join = {"host": host, "port": self._store.port, "prefix": f"group{self._groups}", "world_size": size,
                "transport": transport, "timeout_s": TIMEOUT_S}
        offset, calls = 1, []
        for server in self.servers:
            calls.append(pool.submit(server.post, "/init_weight_transfer_engine",
                                     {"init_info": join | {"rank_offset": offset}}))
            offset += len(server.workers)
        store, forming = dist.PrefixStore(join["prefix"], self._store), Future[Any]()
        # a daemon: it waits for all members, and one that has died must not keep this process from ending
        threading.Thread(target=_open_group, args=(forming, store, size, transport, timeout), daemon=True).start()
        _wait(calls, forming.done)
        self._group = forming.result()
        _all(calls)
        self._members = [server.born for server in self.servers]

    def _stream(self, weights: Iterable[Named], announce: Callable[[dict[str, Any]], list[Future[Any]]]) -> None:
        """Send the buckets."""
        bucket, held = list[Named](), 0

        def flush() -> None:
            info = {"names": [name for name, _ in bucket], "nbytes": held,
                    "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
                    "shapes": [list(t.shape) for _, t in bucket]}
            flat = torch.cat([t.reshape(-1).view(torch.uint8) for _, t in bucket])
            bucket.clear()
            calls = announce(info)
            work = self._group.broadcast([flat], dist.BroadcastOptions())  # from rank 0
            try:
                _wait(calls, work.is_completed)
                work.wait()
            except RuntimeError as error:  # gloo's, of a connection that broke
                raise ServerDown(f"the connection to a server broke: {str(error)[:200]}") from error
            _all(calls)

        for name, tensor in weights:
            tensor = tensor.detach().to(self._staging, copy=True)
            self.comparison.add(name, tensor)
            bucket.append((name, tensor))
            held += tensor.nbytes
            if held >= BUCKET_BYTES:
                flush()
                held = 0
        if bucket:
            flush()


def own_address(urls: Sequence[str]) -> str:
    """This host's address as the servers reach it: by the way to the first that is not on this host."""
    targets = [urlsplit(url) for url in urls]
    target = next((t for t in targets if t.hostname not in ("127.0.0.1", "localhost", "::1")), targets[0])
    try:
        with socket.create_connection((target.hostname or "127.0.0.1", target.port or 80), timeout=10) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise ServerDown(f"{target.geturl()}: {error}") from error


def _open_group(forming: "Future[Any]", store: Any, size: int, transport: str, timeout: timedelta) -> None:
    """A group beside the default one, this process being rank 0."""
    try:
        if transport == "gloo":
            forming.set_result(dist.ProcessGroupGloo(store, 0, size, timeout))
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            forming.set_result(dist.ProcessGroupNCCL(store, 0, size, options))
    except RuntimeError as error:  # torch's, for members that do not come
        forming.set_exception(ServerDown(f"no group with the servers: {str(error)[:200]}"))


def _wait(calls: Sequence[Future[Any]], done: Callable[[], bool]) -> None:
    """Until `done`; raises what a call raises before, since then it never will be."""
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        for call in calls:
            if call.done():
                call.result()
        if time.monotonic() > deadline:
            raise ServerDown(f"no server has taken weights for {TIMEOUT_S:g} s")
        time.sleep(0.0005)


def _all(calls: Sequence[Future[Any]]) -> None:
    """Wait for all, then raise what the first to fail raised: none goes on behind the caller's back."""
    problems = [problem for problem in [call.exception() for call in calls] if problem]
    if problems:
        raise problems[0]
