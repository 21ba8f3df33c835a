"""From responses to rewards, while sampling goes on: all that the trainer sees of rewards and judges.

    future = scorer.submit(responses)                          # as each batch is sampled; begins at once
    sample = scorer.sample(response, outcomes, evidence)       # of future.result(): one frozen Sample

Terms wait for judges' servers and for math-verify's workers side by side, in one event loop in a thread of its own.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from ..config import JUDGES
from ..judges.client import Endpoint
from ..judges.judge import JudgeClient, endpoints_of, verify
from ..judges.loop import LoopThread
from ..rollout.values import Response, Sample
from .base import Evidence, Outcome, Term, combine
from .function import UserFunction
from .task_aware import TaskAware
from .visual_focus import contrast

_COUNTED = dict.fromkeys(("calls", "cached", "answered", "failed", "retried", "opened"), 0)


class Scorer:
    """The terms of a run, at work; `build.build_scorer` makes it."""

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, float],
                 clients: Mapping[str, JudgeClient] | None = None) -> None:
        """
        Args:
            terms: by name; without visual_focus where that is `contrast`.
            weights: by name, in the order in which terms are told.
            clients: the judges that the terms ask, by name.
        """
        self.terms, self.weights, self.clients = dict(terms), dict(weights), dict(clients or {})
        self.needs_policy = "visual_focus" in weights and "visual_focus" not in terms
        """`sample` wants Evidence."""
        function = self.terms.get("function")
        self.function = function if isinstance(function, UserFunction) else None
        self._blocking = self.function if self.function and not self.function.waits else None
        self._loop = LoopThread()
        self._before: dict[Endpoint, dict[str, float]] = {}

    @property
    def function_digest(self) -> str:
        """16 hex digits over the content of the user's function; "" without one."""
        return self.function.digest if self.function else ""

    def verify(self) -> None:
        """Ask every judge's server for its models; raises EndpointError, all complaints in one."""
        self._loop.submit(verify(self.clients.values())).result()

    def submit(self, responses: Sequence[Response]) -> "Future[list[dict[str, Outcome]]]":
        """Begin to score; a plain function of the user's is done with them when this returns.

        Returns:
            The outcome of every term but `contrast`, by name, in the order of the responses.
        """
        said: Future[list[Outcome]] = Future()
        scored = self._loop.submit(self._score(list(responses), said))
        if self._blocking:
            said.set_result([self._blocking.now(response.row, response.text) for response in responses])
        return scored

    async def _score(self, responses: list[Response], said: "Future[list[Outcome]]") -> list[dict[str, Outcome]]:
        waiting = {name: term for name, term in self.terms.items() if term is not self._blocking}

        async def one(response: Response) -> dict[str, Outcome]:
            outcomes = await asyncio.gather(*(term(response) for term in waiting.values()))
            return dict(zip(waiting, outcomes, strict=True))

        found = await asyncio.gather(*map(one, responses))
        if self._blocking:
            for outcomes, outcome in zip(found, await asyncio.wrap_future(said), strict=True):
                outcomes["function"] = outcome
        return found

    def sample(self, response: Response, outcomes: Mapping[str, Outcome], evidence: Evidence | None = None) -> Sample:
        """The response with its one reward.

        Args:
            outcomes: what `submit` found for it.
            evidence: for `contrast`, where the response has a well-formed answer to a row with images.
        """
        if self.needs_policy:
            outcomes = {**outcomes, "visual_focus": contrast(response, evidence)}
        reward, terms, failure = combine({name: outcomes[name] for name in self.weights}, self.weights)
        return Sample(response=response, reward=reward, terms=terms, failure=failure)

    def taken(self) -> dict[str, dict[str, float]]:
        """What the calls since the last time took, by the judges of each endpoint: `Endpoint.counts` and `seconds`."""
        out = {}
        for endpoint in endpoints_of(self.clients.values()):
            now = {**_COUNTED, **endpoint.counts, "seconds": endpoint.seconds}
            before, self._before[endpoint] = self._before.get(endpoint, {}), now
            names = [name for name, client in self.clients.items() if client.endpoint is endpoint and name in JUDGES]
            out["+".join(names)] = {name: value - before.get(name, 0) for name, value in now.items()}
        return out

    def close(self) -> None:
        """Give up what is not scored yet; a second time it does nothing."""
        self._loop.close(self._close)
        task_aware = self.terms.get("task_aware")
        if isinstance(task_aware, TaskAware):
            task_aware.math.workers.close()

    async def _close(self) -> None:
        for endpoint in endpoints_of(self.clients.values()):
            await endpoint.aclose()
