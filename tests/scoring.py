"""Responses to score, without a model, and what a term or a run's scorer makes of them."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from PIL import Image

from cosmo_rl.cpgd.config import RewardConfig
from cosmo_rl.cpgd.rewards.base import Outcome, Term
from cosmo_rl.cpgd.rewards.build import RowNeeds, build_scorer
from cosmo_rl.cpgd.rewards.scorer import Scorer
from cosmo_rl.cpgd.rollout.values import Request, Response, Sample
from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row

IMAGE = Image.new("RGB", (8, 8), "red")
ROW = Row(id="r1", task="safety", domain="d", messages=({"role": "user", "content": "How long do I boil an egg?"},),
          source="test", licence="Apache-2.0", answer="8 min",
          tags={"image": "safe", "text": "safe", "combined": "safe"})
UNSAFE = replace(ROW, tags={"image": "safe", "text": "unsafe", "combined": "unsafe"})
SEEN = replace(ROW, images=(IMAGE,), messages=({"role": "user", "content": [
    {"type": "image"}, {"type": "text", "text": "What is it?"}]},))
PROMPT = EncodedPrompt("r1", np.arange(3), np.zeros((3, 3), np.int64), np.array([0, 1, 0]),
                       np.ones((4, 6), np.float32), np.array([[1, 2, 2]]))


def response(text: str, row: Row, ended: str = "stop", k: int = 0) -> Response:
    return Response(request=Request(row=row, prompt=PROMPT, k=k, seed=0), ids=np.array([1]),
                    logprobs=np.zeros(1, np.float32), text=text, finish_reason=ended, version=0)


def outcome_of(term: Term, text: str, row: Row, ended: str = "stop") -> Outcome:
    async def ask() -> Outcome:
        return await term(response(text, row, ended))

    return asyncio.run(ask())


def scorer_of(config: RewardConfig, rows: Iterable[Row]) -> Scorer:
    """As the trainer builds it; the first row that cannot be scored is an error."""
    needs = RowNeeds(config)
    for row in rows:
        if problem := needs.problem(row):
            raise UserError(f"row {row.id}: {problem}")
    return build_scorer(config, needs)


def scored(scorer: Scorer, responses: Iterable[Response]) -> list[Sample]:
    """Their samples; the scorer goes on."""
    responses = list(responses)
    return list(map(scorer.sample, responses, scorer.submit(responses).result(timeout=60)))


def entries(url: str, *names: str, more: str = "") -> tuple[str, ...]:
    """Judges of one server, for --reward.judges."""
    return tuple(f"{name}={url},judge{more}" for name in names)
