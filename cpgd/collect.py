"""From prompts to scored samples, over all ranks: who samples what, who scores what, and the advantages.

Generate calls are formed over the requests of all ranks and handed out whole, so responses have the same bits at any
number of ranks; every rank ends with all samples.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.collate import Sequence as TokenSequence
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import rank, together, world
from cosmo_rl.model.policy import Policy

from .advantages import group_advantages
from .batch import Request, Response, Sample, request_seed
from .config import Config
from .rewards.base import Evidence, Outcome, check_budget
from .rewards.format import answer_start
from .rewards.scorer import Scorer
from .rewards.visual_focus import blank_prompt
from .rollout import values
from .rollout.engine import Engine, form_batches
from .update import build_micros

T = TypeVar("T")
U = TypeVar("U")


def dealt(batches: Sequence[Sequence[T]], work: Callable[[Sequence[T]], dict[T, U]]) -> dict[T, U]:
    """What `work` makes of each batch, on every rank: whole batches are dealt out; all ranks must call it together.

    Raises:
        UserError: on every rank, once all have come to their end, what `work` raised on one.
    """
    def mine() -> dict[T, U]:
        done: dict[T, U] = {}
        for batch in batches[rank()::world()]:
            done |= work(batch)
        torch.cuda.empty_cache()  # the KV caches' many sizes would stay reserved: nothing left for NCCL's buffers
        return done

    found: dict[T, U] = {}
    for part in together(mine):
        found.update(part)
    return found


def generate(engine: Engine, requests: Sequence[Request], batch_size: int, *,
             finished: Callable[[dict[int, Response]], None] | None = None) -> list[Response]:
    """One response per request on every rank, in the order of the requests; all ranks must call it together.

    Args:
        finished: is given each batch that this rank has sampled, by request, before the next one is begun.
    """
    def sampled(batch: Sequence[int]) -> dict[int, Response]:
        responses = engine.generate([requests[i] for i in batch], batch_size=batch_size)
        part = dict(zip(batch, responses, strict=True))
        if finished:
            finished(part)
        return part

    found = dealt(form_batches([len(r.prompt.input_ids) for r in requests], batch_size), sampled)
    return [found[i] for i in range(len(requests))]


def sample_groups(engine: Engine, rows: Sequence[Row], prompts: Sequence[EncodedPrompt], processor: Processor,
                  config: Config, step: int, judge: Callable[[dict[int, Sample]], None] | None = None,
                  earlier: Sequence[Sample] = ()) -> list[Sample]:
    """`group_size` responses to each prompt, in prompt order; rewards and advantages are still open.

    Args:
        earlier: what this step has sampled before.
        judge: is given each batch of samples, by index, on the rank that sampled it, while the next are sampled.
    """
    requests, times = [], Counter(s.prompt.id for s in earlier if s.k == 0)
    for prompt in prompts:
        for k in range(config.rollout.group_size):
            # A prompt drawn twice goes on counting, or both groups would be the same responses.
            draw = k + times[prompt.id] * config.rollout.group_size
            requests.append(Request(prompt, k, request_seed(config.seed, config.stage, step, prompt.id, draw)))
        times[prompt.id] += 1
    size = config.rollout.group_size

    def samples_of(responses: dict[int, Response]) -> dict[int, Sample]:
        texts = processor.tokenizer.batch_decode([r.ids.tolist() for r in responses.values()], skip_special_tokens=True)
        return {
            i: Sample(row=rows[i // size], prompt=prompts[i // size], group=i // size, k=i % size, response=response,
                      text=text)
            for (i, response), text in zip(responses.items(), texts, strict=True)
        }

    responses = generate(engine, requests, config.rollout.batch_size,
                         finished=judge and (lambda part: judge(samples_of(part))))
    return list(samples_of(dict(enumerate(responses))).values())


def as_value(sample: Sample) -> values.Response:
    """The response as the scorer takes it."""
    request = values.Request(row=sample.row, prompt=sample.prompt, k=sample.k, seed=0)
    old = sample.response
    return values.Response(request=request, ids=old.ids, logprobs=old.logprobs, text=sample.text,
                           finish_reason=old.finish_reason, version=old.version)


class Verdicts:
    """Outcomes of terms, asked for while sampling goes on and collected at its end."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.open: list[tuple[list[int], Future[list[dict[str, Outcome]]]]] = []

    def ask(self, samples: dict[int, Sample]) -> None:
        """Begin to score a batch of this rank's samples, by index."""
        self.open.append((list(samples), self.scorer.submit(list(map(as_value, samples.values())))))

    def collect(self) -> dict[int, dict[str, Outcome]]:
        """Outcomes by sample index and term, of all ranks; all must call it together."""
        mine = lambda: {i: outcomes for indices, future in self.open
                        for i, outcomes in zip(indices, future.result(), strict=True)}
        found = {i: outcomes for part in together(mine) for i, outcomes in part.items()}
        self.open.clear()
        return found


def judges_took(scorer: Scorer | None) -> dict[str, Any]:
    """What the judges' endpoints did since the last time, for a line of metrics.jsonl; all ranks call it together.

    Returns:
        {"judging": {judges of an endpoint: sums over the ranks of `Scorer.taken`}}; {} without judges.
    """
    if scorer is None or not scorer.clients:
        return {}
    ranks = together(scorer.taken)
    return {"judging": {
        endpoint: {name: round(sum(took[endpoint].get(name, 0) for took in ranks), 4)
                   for name in dict.fromkeys(name for took in ranks for name in took[endpoint])}
        for endpoint in ranks[0]
    }}


def score(samples: Sequence[Sample], scorer: Scorer, budget: float, outcomes: Mapping[int, Mapping[str, Outcome]],
          evidence: Mapping[int, Evidence] | None = None, earlier: Sequence[Sample] = ()) -> None:
    """Fill in reward, terms and failure of every sample; all ranks must call it together.

    Args:
        outcomes: by sample index, of `Verdicts.collect`.
        evidence: by sample index, where the scorer needs the policy.
        earlier: scored samples of the same rollout; the budget is one for all.
    Raises:
        RewardBudgetError: on every rank, when too many rewards failed.
    """
    for i, sample in enumerate(samples):
        found = scorer.sample(as_value(sample), outcomes[i], (evidence or {}).get(i))
        sample.reward, sample.terms, sample.failure = found.reward, found.terms, found.failure
    scored = [*earlier, *samples]
    check_budget([f"{s.id}: {s.failure}" for s in scored if s.reward is None], len(scored), budget)


@torch.no_grad()
def gather_evidence(policy: Policy, samples: Sequence[Sample], config: Config, processor: Processor,
                    device: torch.device) -> dict[int, Evidence]:
    """Mean log-prob of each well-formed answer with its images and with blank ones, by sample index.

    For Visual-Focus `contrast`; all ranks must call it together.
    """
    decode = lambda ids: str(processor.tokenizer.decode(ids, skip_special_tokens=True))
    found = {i: answer_start(s.response.ids, decode) for i, s in enumerate(samples) if s.row.images}
    starts = {i: start for i, start in found.items() if start is not None}
    blanks = {id(prompt): blank_prompt(prompt) for prompt in (samples[i].prompt for i in starts)}

    def means(prompt_of: Callable[[Sample], EncodedPrompt]) -> dict[int, float]:
        wanted = list(starts)
        sequences = [TokenSequence(prompt_of(samples[i]), samples[i].response.ids) for i in wanted]
        mine: dict[int, float] = {}
        zeros = [0.0] * len(wanted)  # nothing is trained here
        for micro in build_micros(sequences, zeros, wanted, len(wanted), "token", config, processor, device):
            logprobs, owner = policy(micro.batch).logprobs.cpu(), micro.batch.sequence_ids
            for place, member in enumerate(micro.members):
                sample = wanted[member]
                mine[sample] = logprobs[owner == place][starts[sample]:].mean().item()
        return {i: value for part in together(lambda: mine) for i, value in part.items()}

    seen, blank = means(lambda s: s.prompt), means(lambda s: blanks[id(s.prompt)])
    return {i: Evidence(seen[i], blank[i]) for i in starts}


def fill_advantages(samples: Sequence[Sample], config: Config) -> None:
    """Advantages in float64 per prompt group; failed samples take no part."""
    rewards = np.array([np.nan if s.reward is None else s.reward for s in samples])
    advantages = group_advantages(rewards, np.array([s.group for s in samples]), estimator=config.objective.name,
                                  weight=config.objective.weight, weight_cap=config.objective.weight_cap)
    for sample, advantage in zip(samples, advantages.tolist(), strict=True):
        sample.advantage = advantage


def split_updates(samples: Sequence[Sample], num_prompts: int, updates: int) -> list[tuple[list[Sample], int]]:
    """(samples with a reward, prompts) of each update: contiguous whole groups in prompt order.

    A group counts as a prompt when at least one of its samples has a reward, degenerate or not.
    """
    parts = []
    for groups in np.array_split(np.arange(num_prompts), updates):
        part = [s for s in samples if groups[0] <= s.group <= groups[-1] and s.reward is not None]
        parts.append((part, len({s.group for s in part})))
    return parts
