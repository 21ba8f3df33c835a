"""One rollout, over all ranks together: rows -> requests -> responses -> samples -> advantages.

Generate calls are formed over the requests of all ranks and handed out whole, so responses have the same bits at any
number of ranks up to that of the calls; with more ranks the calls are smaller, so that none is idle. Each rank has what
it samples scored while it samples on; every rank ends with the whole rollout.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch

from cosmo_rl.data.collate import EncodedPrompt, TokenSequence, deal, encode_prompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.sampler import PromptSampler
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import together
from cosmo_rl.model.policy import Policy

from ..advantages import group_advantages
from ..config import Config, DataConfig, ObjectiveConfig, RolloutConfig
from ..rewards.base import Evidence, Outcome, check_budget
from ..rewards.format import answer_start
from ..rewards.overlong import punished
from ..rewards.scorer import Scorer
from ..rewards.visual_focus import blank_prompt
from ..update import BuildUpdates
from .engine import Engine, Fits, Lost, cache_fits, for_all_ranks, form_batches
from .selection import pass_rates, select
from .values import Group, Request, Response, Rollout, Sample, request_seed

PROBED, PROBES, RECOVERIES = 64, 8, 3

T = TypeVar("T")
U = TypeVar("U")
Clock = dict[str, float]
"""Seconds by phase."""
Pending = list[tuple[list[int], "Future[list[dict[str, Outcome]]]"]]
"""What this rank's scorer is at work on: indices of responses, and their outcomes to come."""


def encoder(data: DataConfig, processor: Processor) -> Callable[[Row], EncodedPrompt]:
    """How a run encodes a row, in training and evaluation."""
    return lambda row: encode_prompt(row, processor, max_prompt_tokens=data.max_prompt_tokens,
                                     max_image_pixels=data.max_image_pixels, system_prompt=data.system_prompt)


def prompts_of(rows: Sequence[Row], numbers: Sequence[int],
               encode: Callable[[Row], EncodedPrompt]) -> list[tuple[Row, EncodedPrompt]]:
    """The rows of these numbers, read and encoded on every rank: a row or an image may be readable on one host only."""
    found: list[tuple[Row, EncodedPrompt]] = []

    def read() -> None:
        for i in numbers:
            row = rows[i]
            found.append((row, encode(row)))

    together(read)
    return found


def probes(rows: Sequence[Row], encode: Callable[[Row], EncodedPrompt]) -> Iterator[tuple[Row, EncodedPrompt]]:
    """Of the first PROBED rows one without a picture, and one of each set of picture shapes, at most PROBES in all."""
    shapes: set[bytes] = set()
    for row in islice(rows, PROBED):
        if len(shapes) == PROBES:
            return
        prompt = encode(row)
        shape = b"" if prompt.image_grid_thw is None else prompt.image_grid_thw.tobytes()
        if shape not in shapes:
            shapes.add(shape)
            yield row, prompt


def dealt(engine: Engine, batches: Sequence[Sequence[T]], tokens: Callable[[T], int],
          work: Callable[[Sequence[Sequence[T]]], dict[T, U]]) -> dict[T, U]:
    """What `work` makes of this rank's batches, of all ranks on every rank; all must call it together.

    Args:
        engine: recovers when `work` leaves members out, for which it is then called again.
        tokens: expected of a member, by which the ranks' shares are evened out.
    Raises:
        UserError: on every rank, once all have come to their end, what `work` raised on one.
    """
    found: dict[T, U] = {}
    deaths = 0
    while left := [kept for batch in batches if (kept := [member for member in batch if member not in found])]:
        if deaths > RECOVERIES:
            raise UserError(f"the engine has died {deaths} times in one rollout; look at its log, then repeat the "
                            "command to go on from the last checkpoint")
        if deaths:
            engine.recover()
        replica = engine.replica
        share = deal([sum(map(tokens, batch)) for batch in left], replica.count, len(left))[replica.index]
        done = together(partial(work, [left[i] for i in share]))
        found |= {key: value for part in done for key, value in part.items()}
        deaths += 1  # if something is left
    return found


def sample(engine: Engine, requests: Sequence[Request], rollout: RolloutConfig, fits: Fits, scorer: Scorer,
           clock: Clock) -> tuple[list[Response], Pending]:
    """One response per request on every rank, in the order of the requests; each rank's are being scored already."""
    lengths = [len(r.prompt.input_ids) for r in requests]
    own: dict[int, Response] = {}
    pending: Pending = []

    def stream(batches: Sequence[Sequence[int]]) -> dict[int, tuple]:
        index = {id(requests[i]): i for batch in batches for i in batch}
        size = max(map(len, batches), default=1)
        with suppress(Lost):
            for part in engine.stream([requests[i] for batch in batches for i in batch], batch_size=size):
                done = {index[id(response.request)]: response for response in part}
                own.update(done)
                if not engine.replica.leads:
                    continue
                with timed(clock, "reward"):  # a plain function of the user's is called here
                    pending.append((list(done), scorer.submit(part)))
        # the request is there on every rank, pictures and all
        return {i: (r.ids, r.logprobs, r.text, r.finish_reason, r.version) for i, r in own.items()}

    batches = for_all_ranks(lambda size: form_batches(lengths, size, fits), rollout.batch_size, len(requests),
                            engine.replica.count)
    # How long a response will be is not known, so all are expected at their longest: a call lasts as long as its last.
    found = dealt(engine, batches, lambda i: lengths[i] + rollout.max_new_tokens, stream)

    def response(i: int) -> Response:
        ids, logprobs, text, finish_reason, version = found[i]
        return Response(request=requests[i], ids=ids, logprobs=logprobs, text=text, finish_reason=finish_reason,
                        version=version)

    return [own.get(i) or response(i) for i in range(len(requests))], pending


def score(responses: Sequence[Response], pending: Pending, scorer: Scorer,
          evidence: dict[int, Evidence]) -> list[Sample]:
    """The samples of all ranks, each scored where it was sampled; all must call it together.

    Args:
        evidence: by index, for a scorer that `needs_policy`.
    """
    mine: dict[int, Sample] = {}

    def own() -> dict[int, tuple]:
        mine.update((i, scorer.sample(responses[i], outcomes, evidence.get(i)))
                    for indices, future in pending for i, outcomes in zip(indices, future.result(), strict=True))
        return {i: (s.reward, s.terms, s.failure) for i, s in mine.items()}

    found = {i: scored for part in together(own) for i, scored in part.items()}
    return [mine.get(i) or Sample(response=response, reward=found[i][0], terms=found[i][1], failure=found[i][2])
            for i, response in enumerate(responses)]


@torch.no_grad()
def gather_evidence(policy: Policy, responses: Sequence[Response], processor: Processor,
                    build: BuildUpdates) -> dict[int, Evidence]:
    """Mean log-prob of each well-formed answer with its images and with blank ones, by index of the response.

    For Visual-Focus `contrast`; all ranks must call it together.
    """
    decode = lambda ids: str(processor.tokenizer.decode(ids, skip_special_tokens=True))
    found = {i: answer_start(r.ids, decode) for i, r in enumerate(responses) if r.row.images}
    starts = {i: start for i, start in found.items() if start is not None}
    wanted = list(starts)
    prompts = [responses[i].request.prompt for i in wanted]
    blanks = {id(prompt): blank_prompt(prompt) for prompt in prompts}

    def means(prompts: Sequence[EncodedPrompt]) -> dict[int, float]:
        sequences = [TokenSequence(prompt, responses[i].ids) for i, prompt in zip(wanted, prompts, strict=True)]
        mine: dict[int, float] = {}
        for update in build(sequences, [0.0] * len(wanted), wanted, len(wanted)):  # nothing is trained here
            logprobs, owner = policy(update.batch).logprobs.cpu(), update.batch.sequence_ids
            for place, member in enumerate(update.members):
                i = wanted[member]
                mine[i] = logprobs[owner == place][starts[i]:].mean().item()
        return {i: value for part in together(lambda: mine) for i, value in part.items()}

    seen, blank = means(prompts), means([blanks[id(prompt)] for prompt in prompts])
    return {i: Evidence(seen[i], blank[i]) for i in starts}


def rollout_advantages(groups: Sequence[Group], objective: ObjectiveConfig) -> tuple[np.ndarray, ...]:
    """(K,) float64 of each group; failed samples take no part."""
    rewards = np.array([np.nan if s.reward is None else s.reward for group in groups for s in group])
    sizes = [len(group) for group in groups]
    advantages = group_advantages(rewards, np.repeat(np.arange(len(groups)), sizes), estimator=objective.name,
                                  weight=objective.weight, weight_cap=objective.weight_cap)
    return tuple(np.split(advantages, np.cumsum(sizes)[:-1]))


class Collector:
    """Makes the rollouts of a run."""

    def __init__(self, config: Config, rows: Sequence[Row], sampler: PromptSampler, engine: Engine, scorer: Scorer,
                 policy: Policy, processor: Processor, encode: Callable[[Row], EncodedPrompt],
                 build: BuildUpdates) -> None:
        self.config, self.rows, self.sampler, self.engine, self.scorer = config, rows, sampler, engine, scorer
        self.policy, self.processor, self.encode = policy, processor, encode
        self.build = replace(build, aggregation="token")
        self.fits = cache_fits(config.rollout, processor.config, getattr(torch, config.model.dtype))

    def collect(self, version: int, clock: Clock, step: int | None = None) -> Rollout:
        """The next rollout, of the weights that the engine has, which are those of step `version`.

        Args:
            step: at which it is trained on, for the seeds; None: `version`.
        """
        rollout, sampled = self.config.rollout, list[Sample]()
        attempt = partial(self._attempt, version if step is None else step, clock, sampled)
        groups, first, refill = select(self.sampler.take(rollout.prompts), attempt, self.sampler.replace,
                                       rollout.dynamic_sampling)
        found = Rollout(version=version, groups=tuple(groups), first=tuple(first), refill=refill,
                        advantages=rollout_advantages(groups, self.config.objective),
                        sampled_tokens=sum(len(s.response.ids) for s in sampled),
                        filtered=rollout.overlong == "filter")
        if found.filtered and not any(map(found.teaches, found.samples)):
            raise UserError("every response of the rollout was cut off or not rewarded, and --rollout.overlong filter "
                            "leaves none to learn from; start again in another --run-dir with a larger "
                            "--rollout.max-new-tokens, or without it")
        return found

    def _attempt(self, step: int, clock: Clock, sampled: list[Sample], numbers: Sequence[int]) -> list[Group]:
        """A group of samples for each of these rows; `sampled` holds, and takes, those of the same rollout."""
        size = self.config.rollout.group_size
        with timed(clock, "data"):
            prompts = prompts_of(self.rows, numbers, self.encode)
            requests = self._requests(prompts, step, Counter(s.row.id for s in sampled))
        with timed(clock, "rollout"):
            responses, pending = sample(self.engine, requests, self.config.rollout, self.fits, self.scorer, clock)
        with timed(clock, "reward"):
            evidence = {}
            if self.scorer.needs_policy:
                evidence = gather_evidence(self.policy, responses, self.processor, self.build)
            samples = score(responses, pending, self.scorer, evidence)
            if self.config.rollout.overlong == "punish":
                samples = [punished(s, self.config.rollout.max_new_tokens) for s in samples]
            sampled += samples
            check_budget([f"{s.id}: {s.failure}" for s in sampled if s.reward is None], len(sampled),
                         self.config.reward.failure_budget)
        groups = [tuple(samples[start:start + size]) for start in range(0, len(samples), size)]
        self.sampler.observe(pass_rates(numbers, groups))
        return groups

    def _requests(self, prompts: Sequence[tuple[Row, EncodedPrompt]], step: int,
                  drawn: Counter[str]) -> list[Request]:
        """`group_size` of each prompt; `drawn`: how many of each row this rollout has already."""
        requests: list[Request] = []
        for row, prompt in prompts:
            for k in range(self.config.rollout.group_size):
                # A prompt drawn twice goes on counting, or both groups would be the same responses.
                seed = request_seed(self.config.seed, self.config.stage, step, row.id, drawn[row.id])
                requests.append(Request(row=row, prompt=prompt, k=k, seed=seed))
                drawn[row.id] += 1
        return requests


@contextmanager
def timed(clock: Clock, phase: str) -> Iterator[None]:
    """Add the seconds of a block to its phase, but for those that it spends in blocks of others."""
    started, others = perf_counter(), sum(clock.values())
    yield
    others = sum(clock.values()) - others
    clock[phase] = clock.get(phase, 0.0) + perf_counter() - started - others
