"""Rollout by vLLM servers, in an environment of their own: engine `server`.

Rank 0 of the run steers the servers (weights, checks, starting them again); every rank sends them its own requests, all
at once, and hands on each response as it comes. A server that dies loses the requests that it was at: another server
takes them, else they stay unanswered, the ranks come together, `recover` starts the server again and sends the weights,
and these requests alone are asked once more.
"""

import asyncio
import json
import logging
import queue
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import torch

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import rank, together

from ...config import DataConfig, RolloutConfig
from ...judges.loop import LoopThread
from ..engine import Lost, Replica, alone
from ..values import Request, Response
from .control import START, Control, ServerDown, check_described
from .pixels import PIXELS, compare_pixels
from .serve import Served
from .sync import Named, WeightSync
from .wire import ReplyError, Wire, mm_limits

logger = logging.getLogger(__name__)

IN_FLIGHT = 512
"""Most requests of one rank at a time; a server queues what it cannot batch yet."""
REPLY_S = 3600.0
"""Longest wait for one reply, its time in the queue included."""
TRIES = 3
"""Most tries of a sync, each after what had died was started again."""
BATCHED = 2048
"""Tokens that a server on the CPU computes at a time, if a prompt is not longer."""
ON_CPU = "VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_HOST_IP=127.0.0.1"
"""For servers that are started beside a trainer on the CPU: they would take 9 tenths of memory and pin all cores."""


def _kept(weights: Callable[[], Iterable[Named]]) -> Callable[[], Iterable[Named]]:
    """The same, of a copy on rank 0: the policy is trained on while a rollout of these is made."""
    copied = [(name, tensor.to("cpu", copy=True)) if rank() == 0 else ("", tensor[:0]) for name, tensor in weights()]
    return lambda: copied if rank() == 0 else ()


class ServerEngine:
    """Samples with vLLM servers; see `cosmo_rl.cpgd.rollout.engine.Engine`. All ranks make it together."""

    def __init__(self, path: Path, processor: Processor, rollout: RolloutConfig, data: DataConfig, *,
                 device: torch.device, dtype: torch.dtype, folder: Path) -> None:
        """
        Args:
            path: model folder, for the servers that are started.
            device, dtype: of the weights that come by `sync`.
            folder: for the logs of servers that are started.
        Raises:
            UserError: on every rank: a server does not start or answer, or it is of another model, dtype, length or
                version than the run needs.
        """
        self.processor, self.rollout, self.data = processor, rollout, data
        self.dtype = str(dtype).removeprefix("torch.")
        self.wire, self.version = Wire(processor, rollout), 0
        self._served: list[Served] = []
        self._loop = LoopThread()
        self._syncs, self._probes, self._weights = 0, count(), None
        try:
            found = together(lambda: self._open(path, device, folder) if rank() == 0 else ([], ""))
        except UserError:
            self.close()
            raise
        self.urls, self._nonce = found[0]
        self.tag = ""

    def _open(self, path: Path, device: torch.device, folder: Path) -> tuple[list[str], str]:
        """Start and meet all servers; rank 0 only."""
        length = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        options = ["--dtype", self.dtype, "--max-model-len", str(length),
                   "--mm-processor-kwargs", mm_limits(self.processor)]
        if device.type == "cpu":
            options += ["--enforce-eager", "--distributed-executor-backend", "uni"]
            # In parts, vLLM 0.32 dies: for each it sets a seeded request's generator back, which torch's CPU one lacks.
            options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(length, BATCHED))]
        for i, launch in enumerate(self.rollout.serve):
            launch = f"{ON_CPU} {launch}" if device.type == "cpu" else launch
            self._served.append(Served(launch, path, folder / f"vllm{i}.log", options))
        for served in self._served:
            logger.info("starting a vLLM server: %s (its log: %s)", served.launch, served.log)
            served.start()
        for served in self._served:
            served.wait()
        self._servers = [*(Control(url) for url in self.rollout.servers), *(s.control for s in self._served)]
        for server in self._servers:
            try:
                self._meet(server)
            except ServerDown as error:
                raise UserError(f"--rollout.servers: nothing answers at {error}; {START}") from error
        self._sync = WeightSync(self._servers, device, self.rollout.verify_every)
        return [server.url for server in self._servers], secrets.token_hex(4)

    def _meet(self, server: Control) -> None:
        server.meet()
        check_described(server.url, server.workers[0], self.processor, self.dtype, self.data, self.rollout)

    @property
    def replica(self) -> Replica:
        return alone()

    # -- weights ------------------------------------------------------------------------------------------------------

    def sync(self, weights: Callable[[], Iterable[Named]], version: int) -> None:
        """See `Engine.sync`.

        Raises:
            UserError: a server does not come back. WeightsDiffer: it does not have what was sent.
        """
        self._weights = None  # those before make room
        self._weights = _kept(weights) if self.rollout.staleness else weights
        self._give(self._weights, version)

    def _give(self, weights: Callable[[], Iterable[Named]], version: int) -> None:
        for _ in range(TRIES):
            self._syncs += 1
            tag = f"{self._nonce}-{self._syncs}-step{version}"
            # All ranks wait for servers here: once weights are gathered, NCCL gives rank 0 ten minutes.
            problem = together(self._revive)[0] or together(partial(self._send, weights(), tag))[0]
            if not problem:
                self.version, self.tag = version, tag
                return
            if rank() == 0:
                logger.warning("WARNING: %s; sending all weights again", problem)
        raise UserError(f"{problem}: {TRIES} times in a row; look at the server's log, or repeat the command to go on "
                        "from the last checkpoint")

    def rest(self) -> bool:
        """The servers have GPUs of their own."""
        return False

    def recover(self) -> None:
        """See `Engine.recover`."""
        assert self._weights
        self._give(self._weights, self.version)

    def _send(self, weights: Iterable[Named], tag: str) -> str:
        """One try; what has died, if so. Every rank reads `weights` to the end, or the others would wait for it."""
        left = iter(weights)
        try:
            if rank() == 0:
                self._sync.send(left, tag)
        except ServerDown as error:
            return str(error)
        finally:
            for _ in left:
                pass
        return ""

    def _revive(self) -> str:
        """Have all servers there; what has died once more, if so. Rank 0 alone works."""
        if rank():
            return ""
        for served in self._served:
            if not served.control.alive():
                logger.warning("WARNING: the vLLM server at %s is gone (its log: %s); starting it again",
                               served.control.url, served.log)
                served.start()
        for served in self._served:
            served.wait()
        try:
            for server in self._servers:
                server.wait()
                if not self._knows(server):
                    self._meet(server)
        except ServerDown as error:
            return str(error)
        return ""

    @staticmethod
    def _knows(server: Control) -> bool:
        """Whether it is still the process that was met."""
        return server.workers == server.rpc("cosmo_describe")

    # -- requests -----------------------------------------------------------------------------------------------------

    def stream(self, requests: Sequence[Request], *, greedy: bool = False,
               batch_size: int | None = None) -> Iterator[list[Response]]:
        """See `Engine.stream`; the servers form their batches themselves, so `batch_size` says nothing.

        Greedy log-probs are those of temperature 1.

        Raises:
            ReplyError: see `Wire.read`. Lost: see `Engine.stream`.
        """
        done: queue.SimpleQueue[tuple[Request, Any] | None] = queue.SimpleQueue()
        asking = self._loop.submit(self._ask_all(list(requests), greedy, done))
        asking.add_done_callback(lambda _: done.put(None))
        answered = 0
        try:
            while (answer := done.get()) is not None:
                answered += 1
                yield [self.wire.read(*answer, self.tag, self.version)]
            asking.result()
        finally:
            asking.cancel()
        if answered < len(requests):
            raise Lost

    async def _ask_all(self, requests: Sequence[Request], greedy: bool, done: "queue.SimpleQueue[Any]") -> None:
        slots, bodies, dead = asyncio.Semaphore(IN_FLIGHT), dict[int, dict[str, Any]](), set[str]()
        timeout = httpx2.Timeout(REPLY_S, connect=30.0)
        limits = httpx2.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        async with httpx2.AsyncClient(timeout=timeout, limits=limits) as client:
            async def one(i: int, request: Request) -> None:
                async with slots:
                    prompt = request.prompt
                    if id(prompt) not in bodies:
                        bodies[id(prompt)] = self.wire.prompt(prompt, self.tag)
                    body = json.dumps(bodies[id(prompt)] | {"sampling_params": self.wire.sampling(request, greedy)})
                    turn = (i + rank()) % len(self.urls)
                    for url in [*self.urls[turn:], *self.urls[:turn]]:
                        if url not in dead:
                            try:
                                done.put((request, await self._ask(client, url, request, body)))
                                return
                            except ServerDown as error:
                                if url not in dead:  # the first of its requests to be told
                                    logger.warning("WARNING: %s", error)
                                dead.add(url)

            await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))

    @staticmethod
    async def _ask(client: httpx2.AsyncClient, url: str, request: Request, body: str) -> Any:
        """The reply.

        Raises:
            ReplyError: it refuses the request. ServerDown: it is gone.
        """
        try:
            answer = await client.post(f"{url}/inference/v1/generate", content=body,
                                       headers={"Content-Type": "application/json"})
        except httpx2.TransportError as error:
            raise ServerDown(f"request {request.id}: {url}: {type(error).__name__} {error}".rstrip()) from error
        if answer.status_code != 200:
            told = f"{url} answers {answer.status_code}: {' '.join(answer.text.split())[:300]}"
            if answer.status_code >= 500:  # its engine has died, which it tells each of its requests
                raise ServerDown(f"request {request.id}: {told}")
            raise ReplyError(f"request {request.id}: {told}")
        try:
            return answer.json()
        except ValueError as error:
            raise ReplyError(f"request {request.id}: {url} answers something that is not JSON") from error

    # -- checks -------------------------------------------------------------------------------------------------------

    def check(self, samples: Iterable[tuple[Row, EncodedPrompt]]) -> None:
        """See `Engine.check`: every server returns the prompt's ids, and its tower sees the trainer's pixels."""
        together(lambda: [self._probe(row, prompt) for row, prompt in samples] if rank() == 0 else None)

    def _probe(self, row: Row, prompt: EncodedPrompt) -> None:
        request = Request(row=row, prompt=prompt, k=0, seed=0)
        for server in self._servers:
            server.rpc("cosmo_watch_pixels", PIXELS)
            # under a tag of its own: features that are there already would not be made again
            body = self.wire.prompt(prompt, f"{self.tag}-probe{next(self._probes)}") | {
                "sampling_params": self.wire.sampling(request, True)}
            try:
                reply = server.post("/inference/v1/generate", body)
                seen = server.rpc("cosmo_pixels_seen")[0]
            except ServerDown as error:
                raise UserError(f"{error}, while the first prompt was tried") from error
            self.wire.read(request, reply, self.tag, self.version)
            compare_pixels(request, server.url, seen, self.processor, self.dtype)

    def close(self) -> None:
        """End the servers that this run has started."""
        self._loop.close()
        for served in self._served:
            served.stop()
            served.control.close()
