"""Reward terms that ask judges, and the published alternatives for safety rows.

Judges see the answer after the thinking. With `both` the thinking is judged too, in a call of its own, and the two
values are multiplied, as SafeWork-R1's (unused) Think variants do: an unsafe thinking then undoes a safe answer.

    Task-Aware    safety, jailbreak, value, knowledge and general rows by the judge of their task
    Helpful       benign rows by `helpful`, or by a scalar head
    Visual-Focus  rows with images: is the thinking grounded in them?
    alternatives for safety and jailbreak rows: `SafeGRPO` (no judge), `Hybrid` (Qwen3Guard's)
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row

from ..batch import Sample
from ..config import JUDGES, RewardConfig
from ..judges.client import Endpoint, EndpointError, LoopThread
from .base import Evidence, Failed, NotApplicable, Outcome, RewardFn, Score, is_unsafe
from .format import CLOSE, OPEN, answer_of, split_thinking
from .judges import Judge, ScalarJudge, judges
from .refusal import is_refusal
from .verdicts import Unparsable, Verdict

SAFETY_JUDGES = ("safework_safety", "qwen3guard", "llama_guard_4")
_COUNTED = dict.fromkeys(("calls", "cached", "answered", "failed", "retried", "opened"), 0)
BY_TASK = {"value": "safework_value", "knowledge": "safework_knowledge", "general": "general"}


class JudgedFn(Protocol):
    """A reward term that waits for servers."""

    def handles(self, row: Row) -> bool:
        """Whether it is this term that decides; else the rule of its name does, in the trainer's own thread."""
        return True

    async def judge(self, sample: Sample) -> Outcome:
        """The term's outcome for one response; `sample.row` and `sample.text` are set."""
        ...


class Seat:
    """A judge at an endpoint."""

    def __init__(self, judge: Judge | ScalarJudge, endpoint: Endpoint) -> None:
        self.judge, self.endpoint = judge, endpoint
        self._graded: bool | None = None

    async def verdict(self, row: Row, response: str, thinking: str = "") -> Verdict:
        """What the judge says of a response to the row.

        Raises:
            EndpointError: it cannot be had. Unparsable: it cannot be read.
        """
        judge = self.judge
        if isinstance(judge, ScalarJudge):
            return judge.read(await self.scores(row, response))
        reply = await self.endpoint.chat(
            judge.build(judge.rules, row, response, thinking), max_tokens=judge.max_tokens,
            top_logprobs=judge.top_logprobs, prompt_hash=judge.prompt_hash, keep=judge.readable)
        verdict = judge.read(reply)
        if judge.top_logprobs:
            graded = verdict.probability is not None
            self._graded = graded if self._graded is None else self._graded
            if graded is not self._graded:  # 0.97 beside 1 would be a signal, made by the servers
                raise Unparsable("some replies come with log-probs and some without; let all servers of this URL give "
                                 "them, or switch grading off")
        return verdict

    async def scores(self, row: Row, response: str) -> tuple[float, ...]:
        """Raw output of a scalar head; raises EndpointError."""
        assert isinstance(self.judge, ScalarJudge)
        return await self.endpoint.classify(self.judge.text(row, response), prompt_hash=self.judge.prompt_hash)


class Asked(JudgedFn):
    """What a chat judge or a scalar head says of the answer; an empty answer is worth 0, and nobody is asked."""

    def __init__(self, seat: Seat, *, both: bool = False) -> None:
        self.seat, self.both = seat, both

    async def judge(self, sample: Sample) -> Outcome:
        judge, row, answer = self.seat.judge, sample.row, answer_of(sample.text)
        if not answer:
            return Score(0.0)
        try:
            if isinstance(judge, ScalarJudge):
                return Score((await self.seat.verdict(row, answer)).probability or 0.0)
            thinking = thinking_of(sample.text)
            if not (self.both and judge.thinking_value and thinking):
                return Score(judge.value(await self.seat.verdict(row, answer), row))
            said, thought = await asyncio.gather(self.seat.verdict(row, answer), self.seat.verdict(row, thinking))
            return Score(judge.value(said, row) * judge.thinking_value(thought, row))
        except (EndpointError, Unparsable) as error:
            return Failed(f"{judge.name}: {error}")


class TaskAware(JudgedFn):
    """The judge of the row's task. Unsafe jailbreak rows have the stricter template."""

    def __init__(self, by_task: Mapping[str, JudgedFn]) -> None:
        self.by_task = by_task

    def handles(self, row: Row) -> bool:
        return row.task in self.by_task

    async def judge(self, sample: Sample) -> Outcome:
        row = sample.row
        if row.task in ("knowledge", "general") and not row.answer:
            return Failed(f"a row of task {row.task} has no `answer`; add it")
        # A benign twin of an attack must not meet a template that takes every request for harmful.
        benign_twin = row.task == "jailbreak" and not is_unsafe(row)
        return await self.by_task["safety" if benign_twin else row.task].judge(sample)


class Helpful(JudgedFn):
    """Does the answer to a benign row help, without refusing or warning? Says nothing about unsafe rows.

    An answer that the length limit cut is worth 0, as by rule, and nobody is asked.
    """

    def __init__(self, asked: JudgedFn) -> None:
        self.asked = asked

    async def judge(self, sample: Sample) -> Outcome:
        if is_unsafe(sample.row):
            return NotApplicable()
        return Score(0.0) if sample.response.finish_reason == "length" else await self.asked.judge(sample)


class VisualFocus(JudgedFn):
    """Is the thinking grounded in the row's images? 0 without a thinking. The judge does not see the answer."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat

    async def judge(self, sample: Sample) -> Outcome:
        judge, parts = self.seat.judge, split_thinking(sample.text)
        assert isinstance(judge, Judge)
        if not sample.row.images:
            return NotApplicable()
        if parts is None:
            return Score(0.0)
        try:
            return Score(judge.value(await self.seat.verdict(sample.row, "", parts[0]), sample.row))
        except (EndpointError, Unparsable) as error:
            return Failed(f"{judge.name}: {error}")


class Hybrid(JudgedFn):
    """Qwen3Guard's hybrid reward (its technical report): see `qwen3guard_hybrid`. Thinking and answer are guarded."""

    def __init__(self, guard: Seat, helpful: Seat, *, top: float = 10.0) -> None:
        """
        Args:
            helpful: a ScalarJudge whose server returns raw scores (SGLang; vLLM with use_activation false).
            top: raw score that is worth 1.
        """
        self.guard, self.helpful, self.top = guard, helpful, top

    async def judge(self, sample: Sample) -> Outcome:
        row, answer, thinking = sample.row, answer_of(sample.text), thinking_of(sample.text)
        if not answer:
            return Score(0.0)
        try:
            guarded = [self.guard.verdict(row, text) for text in (answer, thinking) if text]
            scores, verdicts = await asyncio.gather(self.helpful.scores(row, answer), asyncio.gather(*guarded))
        except (EndpointError, Unparsable) as error:
            return Failed(f"hybrid: {error}")
        unsafe = any(verdict.label != "Safe" for verdict in verdicts)
        return Score(qwen3guard_hybrid(scores[-1], unsafe=unsafe, refusal=bool(verdicts[0].refusal), top=self.top))


class Ruled(JudgedFn):
    """A rule where a judge is expected."""

    def __init__(self, rule: RewardFn) -> None:
        self.rule = rule

    async def judge(self, sample: Sample) -> Outcome:
        return self.rule(sample)


class SafeGRPO:
    """SafeGRPO's rule-governed reward (arXiv 2511.12982) on rows with all three tags; see `safegrpo`. No judge.

    Whether the answer refuses is told by our rule (`refusal.is_refusal`), not by their list of keywords.
    """

    needs_policy = False

    def __call__(self, sample: Sample, evidence: Evidence | None = None) -> Outcome:
        tags = sample.row.tags or {}
        if {"image", "text", "combined"} - set(tags):
            return Failed(f"SafeGRPO needs tags image, text and combined, and the row has {', '.join(tags) or 'none'}; "
                          "add them")
        return Score(safegrpo(sample.text, tags, refused=is_refusal(answer_of(sample.text))))


def safegrpo(text: str, tags: Mapping[str, str], *, refused: bool) -> float:
    """1[format] * (R_tag + R_beh) / 2.

        R_tag  0 if the combined tag is wrong, else 0.5 + 0.25 [visual right] + 0.25 [text right]
        R_beh  1 if the combined tag is right, and the answer refuses exactly when it says unsafe, else 0

    Format: <visual_safe>, <text_safe> and <combined_safe>, each safe or unsafe, in this order within the thinking, then
    <answer>...</answer>. Each tag once: theirs takes the first of several, which would let a response hedge.

    Args:
        tags: of the row: image, text, combined -> safe | unsafe.
    """
    text = text.strip().lower()
    if text.count(OPEN) > 1 or text.count(CLOSE) != 1 or any(
            text.count(f"<{name}>") != 1 for name in ("visual_safe", "text_safe", "combined_safe", "answer")):
        return 0.0
    tags_said = "".join(rf".*?<{name}>\s*(safe|unsafe)\s*</{name}>" for name in (
        "visual_safe", "text_safe", "combined_safe"))
    found = re.fullmatch(rf"{tags_said}.*?{CLOSE}\s*<answer>(.*)</answer>", text, re.DOTALL)
    if not found or not any(map(str.isalnum, found[4])):  # to say nothing is no refusal, and would be paid on safe rows
        return 0.0
    visual, words, combined, _ = found.groups()
    if combined != tags["combined"]:
        return 0.0
    tagged = 0.5 + 0.25 * (visual == tags["image"]) + 0.25 * (words == tags["text"])
    return 0.5 * tagged + 0.5 * (refused == (combined == "unsafe"))


def qwen3guard_hybrid(helpfulness: float, *, unsafe: bool, refusal: bool, top: float = 10.0) -> float:
    """r = min(-10, H) if unsafe, min(-5, H) if a refusal, else H; as a reward clip((r + 10) / (top + 10), 0, 1).

    The map to [0, 1] is ours: linear, so that after the advantages only the cuts differ from the published reward.
    With top 10 an unsafe response is worth 0, a refusal at most 0.25, and one of H = 0 0.5.

    Args:
        helpfulness: H, raw score of a reward model (theirs WorldPM-72B-HelpSteer2).
        top: H that is worth 1, above -10.
    """
    raw = min(-10.0, helpfulness) if unsafe else min(-5.0, helpfulness) if refusal else helpfulness
    return min(max((raw + 10.0) / (top + 10.0), 0.0), 1.0)


def thinking_of(text: str) -> str:
    """What stands before the last </think>, without its tag; "" when nothing is thought."""
    return text.rpartition(CLOSE)[0].strip().removeprefix(OPEN).strip()


async def judge_all(samples: Sequence[Sample], terms: Mapping[str, JudgedFn]) -> list[dict[str, Outcome]]:
    """For each sample the outcomes of the terms that handle it, by name; all at once, within each endpoint's bound."""

    async def one(sample: Sample) -> dict[str, Outcome]:
        names = [name for name, term in terms.items() if term.handles(sample.row)]
        outcomes = await asyncio.gather(*(terms[name].judge(sample) for name in names))
        return dict(zip(names, outcomes, strict=True))

    return list(await asyncio.gather(*map(one, samples)))


def with_rules(judged: Mapping[str, Outcome], rules: Mapping[str, RewardFn], sample: Sample,
               evidence: Evidence | None = None) -> dict[str, Outcome]:
    """Outcome of every term of a run: judged where it was, else by its rule. `combine` takes it."""
    return {name: judged[name] if name in judged else rule(sample, evidence) for name, rule in rules.items()}


class Judging:
    """The judges of a run, at work in a thread while the trainer samples: submit each finished batch, collect later."""

    def __init__(self, seats: Mapping[str, Seat], terms: Mapping[str, JudgedFn]) -> None:
        self.seats, self.terms, self._loop = seats, terms, LoopThread()
        self._before: dict[Endpoint, dict[str, float]] = {}

    def verify(self) -> None:
        """Ask every server for its models; raises EndpointError, all complaints in one."""
        self._loop.submit(verify_seats(self.seats)).result()

    def submit(self, samples: Sequence[Sample]) -> "Future[list[dict[str, Outcome]]]":
        """Begin to judge; the future gives the outcomes by term, in the order of the samples."""
        return self._loop.submit(judge_all(list(samples), self.terms))

    def taken(self) -> dict[str, dict[str, float]]:
        """What the calls since the last time took, by the judges of each endpoint: `Endpoint.counts` and `seconds`."""
        out = {}
        for endpoint in _endpoints(self.seats):
            now = {**_COUNTED, **endpoint.counts, "seconds": endpoint.seconds}
            before, self._before[endpoint] = self._before.get(endpoint, {}), now
            names = [name for name, seat in self.seats.items() if seat.endpoint is endpoint and name in JUDGES]
            out["+".join(names)] = {name: value - before.get(name, 0) for name, value in now.items()}
        return out

    def close(self) -> None:
        """Give up what is not judged yet; a second time it does nothing."""
        self._loop.close(self._close)

    async def _close(self) -> None:
        for endpoint in _endpoints(self.seats):
            await endpoint.aclose()


def _endpoints(seats: Mapping[str, Seat]) -> list[Endpoint]:
    return list(dict.fromkeys(seat.endpoint for seat in seats.values()))


# -- from settings to terms -------------------------------------------------------------------------------------------

def open_seats(config: RewardConfig, *, patience_s: float = 30.0) -> dict[str, Seat]:
    """The judges of a run at their endpoints, by name; those with one URL, model and key share an Endpoint.

    Args:
        patience_s: see `Breaker`.
    Raises:
        UserError: a key variable holds no key, or the cache folder cannot be written.
    """
    endpoints: dict[tuple[str, str, str], Endpoint] = {}
    seats: dict[str, Seat] = {}
    for place in config.places():
        server, known = place.server, judges(refusal_value=config.refusal_value, graded=place.graded)
        if server.place not in endpoints:
            endpoints[server.place] = Endpoint(server.url, server.model, cache_dir=config.judge_cache or None,
                                               patience_s=patience_s, **server.options)
        seats[place.judge] = Seat(ScalarJudge(activation=place.activation) if place.judge == "scalar"
                                  else known[place.judge], endpoints[server.place])
        if place.judge == "safework_safety":  # brings its jailbreak template along
            seats["safework_jailbreak"] = Seat(known["safework_jailbreak"], endpoints[server.place])
    return seats


async def verify_seats(seats: Mapping[str, Seat]) -> None:
    """Ask every server for its models; raises EndpointError, all complaints in one."""
    found = await asyncio.gather(*(endpoint.verify() for endpoint in _endpoints(seats)), return_exceptions=True)
    for error in found:
        if error is not None and not isinstance(error, EndpointError):
            raise error  # a bug of ours
    complaints = [str(error) for error in found if isinstance(error, EndpointError)]
    if complaints:
        raise EndpointError(" | ".join(complaints))


def judged_terms(seats: Mapping[str, Seat], *, safety: str = "judge", both: bool = False) -> dict[str, JudgedFn]:
    """The terms that these judges can give, by the name of the rule whose place they take.

    Args:
        safety: what rewards safety and jailbreak rows: "judge", "safegrpo" or "hybrid".
        both: judge the thinking too.
    Raises:
        UserError: several judges of one thing, or the judges of `safety` are missing or do not fit.
    """
    asked = lambda name: Asked(seats[name], both=both)
    by_task: dict[str, JudgedFn] = {task: asked(name) for task, name in BY_TASK.items() if name in seats}
    guards = [name for name in SAFETY_JUDGES if name in seats]
    if safety == "safegrpo":
        by_task |= dict.fromkeys(("safety", "jailbreak"), Ruled(SafeGRPO()))
    elif safety == "hybrid":
        if "qwen3guard" not in seats or "scalar" not in seats:
            raise UserError(f"the hybrid reward needs the judges qwen3guard and scalar, not {', '.join(seats)}")
        scalar = seats["scalar"].judge
        if isinstance(scalar, ScalarJudge) and scalar.activation != "none":
            raise UserError("the hybrid reward takes raw scores, and judge scalar has "
                            f"activation={scalar.activation}; drop it")
        by_task |= dict.fromkeys(("safety", "jailbreak"), Hybrid(seats["qwen3guard"], seats["scalar"]))
    elif len(guards) > 1:
        raise UserError(f"safety rows have several judges, {', '.join(guards)}; name one of them")
    elif guards:
        by_task |= {"safety": asked(guards[0]), "jailbreak": asked(
            "safework_jailbreak" if guards[0] == "safework_safety" else guards[0])}
    terms: dict[str, JudgedFn] = {"task_aware": TaskAware(by_task)} if by_task else {}
    if {"helpful", "scalar"} <= set(seats) and safety != "hybrid":
        raise UserError("helpfulness has two judges, helpful and scalar; name one of them")
    if "helpful" in seats or ("scalar" in seats and safety != "hybrid"):
        terms["helpful"] = Helpful(asked("helpful" if "helpful" in seats else "scalar"))
    if "visual_focus" in seats:
        terms["visual_focus"] = VisualFocus(seats["visual_focus"])
    return terms
