"""One vLLM server as rank 0 of a run steers it: its routes as methods, its answers as errors that say what to mend."""

import logging
import time
from collections.abc import Mapping
from itertools import count
from typing import Any

import httpx2

from cosmo_rl.data.errors import UserError
from cosmo_rl.model.load import Processor

from ...config import DataConfig, RolloutConfig

START = "start it with `python -m cosmo_rl.cpgd.rollout.vllm.serve`, which shows the whole command"
CONNECT_S, ANSWER_S = 10.0, 900.0
"""Longest wait for a connection, and for an answer: a weight update may take minutes."""
BACK_S, POLL_S = 1200.0, 0.5
"""Longest wait for a server of the user's that has died, and between looks at it."""
_births = count()
logger = logging.getLogger(__name__)

for _name in ("httpx2", "httpcore2"):  # at INFO they write a line a request
    logging.getLogger(_name).setLevel(logging.WARNING)


class ServerDown(Exception):
    """A server that does not answer, or whose engine has died: another try may find it alive again."""


class Control:
    """A server at a URL. `workers` says what it is, once `meet` was called."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.workers: list[dict[str, Any]] = []
        self.born = -1
        """Another number whenever the server may be another process than before."""
        self._client = httpx2.Client(timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S))

    def alive(self) -> bool:
        """Whether it answers, and its engine lives."""
        try:
            return self._client.get(f"{self.url}/health", timeout=CONNECT_S).status_code == 200
        except httpx2.TransportError:
            return False

    def wait(self) -> None:
        """Until it answers, as when its user starts it again.

        Raises:
            UserError: it took too long.
        """
        if self.alive():
            return
        logger.warning("WARNING: the vLLM server at %s does not answer; waiting for it, %g s at most", self.url, BACK_S)
        deadline = time.monotonic() + BACK_S
        while not self.alive():
            if time.monotonic() > deadline:
                raise UserError(f"the vLLM server at {self.url} did not come back within {BACK_S:g} s; start it again, "
                                "then repeat the command to go on from the last checkpoint")
            time.sleep(POLL_S)

    def meet(self) -> None:
        """Ask what it is.

        Raises:
            ServerDown: nothing answers. UserError: it is no server that can be trained with.
        """
        found = self.rpc("cosmo_describe")
        if not found or not all(isinstance(worker, dict) and "max_model_len" in worker for worker in found):
            raise UserError(f"{self.url}: its workers say {str(found)[:80]} of themselves; {START}")
        self.workers, self.born = found, next(_births)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer of a route, None where it has no content; raises as `meet`."""
        try:
            answer = self._client.post(self.url + path, json=body)
        except httpx2.TransportError as error:
            raise ServerDown(f"{self.url}: {type(error).__name__} {error}".rstrip()) from error
        if answer.status_code == 404:
            raise UserError(f"{self.url} has no {path}: it is no vLLM server of 0.32 or newer, or lacks "
                            f"VLLM_SERVER_DEV_MODE=1 or --enable-scale-out; {START}")
        if answer.status_code >= 500 and not self.alive():
            raise ServerDown(f"{self.url}{path}: {answer.status_code}, and its engine has died")
        if answer.status_code != 200:
            raise UserError(f"{self.url}{path} answers {answer.status_code}: {_told(answer)}; {START}")
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise UserError(f"{self.url}{path} answers something that is not JSON; {START}") from error

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        """What every worker returns."""
        found = self.post("/collective_rpc", {"method": method, "args": list(arguments)})
        if not isinstance(found, dict) or not isinstance(found.get("results"), list):
            raise UserError(f"{self.url}: {method} returns {str(found)[:80]}; {START}")
        return found["results"]

    def close(self) -> None:
        self._client.close()


def check_described(where: str, said: Mapping[str, Any], processor: Processor, dtype: str, data: DataConfig,
                    rollout: RolloutConfig) -> None:
    """Whether an engine can be trained with.

    Args:
        where: names it. said: what `cosmo_describe` returns of a worker.
    Raises:
        UserError: it is of another model, dtype, length or kind than the run needs.
    """
    wanted = {"model": "Qwen2_5_VLForConditionalGeneration", "dtype": dtype, "vocab_size": processor.vocab_size,
              "logprobs_mode": "processed_logprobs", "data_parallel_size": 1, "pipeline_parallel_size": 1}
    for name, value in wanted.items():
        if said.get(name) != value:
            mend = ("serve the run's own model folder" if name in ("model", "vocab_size") else
                    f"give it --{name.replace('_', '-')} {value}")
            raise UserError(f"{where} has {name} {said.get(name)}, and the run {value}; {mend}")
    length = data.max_prompt_tokens + rollout.max_new_tokens
    if said["max_model_len"] < length:
        raise UserError(f"{where} takes {said['max_model_len']} tokens, and --data.max-prompt-tokens "
                        f"{data.max_prompt_tokens} with --rollout.max-new-tokens {rollout.max_new_tokens} needs "
                        f"{length}; give it --max-model-len {length}")


def _told(answer: httpx2.Response) -> str:
    return " ".join(answer.text.split())[:300] or "nothing more"
