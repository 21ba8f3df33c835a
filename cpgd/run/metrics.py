"""What a run says while it trains: metrics.jsonl, samples.jsonl, evals.jsonl, warnings.jsonl, TensorBoard and console.

Rank 0 only.

One line of metrics.jsonl an optimizer step, with the keys

    step, iteration, loss, grad_norm, lr, reward, clip_fraction, drift, entropy, response_tokens, response_length
    engine_gap         {"mean", "p99", "max": of |trainer - engine| log-prob over all tokens of the rollout, nats;
                       "response": largest mean of one response, which the canary limits}
    sampler_z          the canary's, over the last rollouts
    correction         with --rollout.correction: {"mean": of the importance weights, "truncated": share of tokens}
    rewards            {domain: {"reward" or a term: {"mean", "std", "saturated"}}}, see `reward_stats`
    seconds            {phase: s}
    tokens_per_second  {phase: 1/s}
    judging            {judges of an endpoint: {calls, cached, answered, failed, retried, opened, seconds, and failed
                       attempts by kind}}, sums over the ranks; in the first line of an iteration that asked judges

(more are allowed, and a stage without rollouts leaves some out). Only TIMING_FIELDS may differ between two runs of one
seed.
"""

import json
import logging
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cosmo_rl.data import strict_json
from cosmo_rl.data.disk import fsync, replace_file
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.terminal import printable
from cosmo_rl.model.parallel import together

from ..rewards.scorer import Scorer
from ..rollout.values import Group, Rollout
from ..update import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
TIMING_FIELDS = ("seconds", "tokens_per_second", "judging")
"""What a step took, not what it did: a verdict is the same from the cache and after three attempts."""
FILES = ("metrics", "samples", "nonfinite", "evals", "warnings")
"""Lines of steps, sampled responses, skipped steps with their samples, evaluations, and what `watch.Watch` has said."""
ALWAYS = ("metrics", "samples")
"""There from the start; the others once there is a line for them."""
CHARTED = ("metrics", "evals")
"""Shown in TensorBoard."""
NO_BREAK = "\u00a0"
WIDEST = len("-1.23e-06")
NAME_WIDTH = 14
"""Columns of the console that a domain's name has at least."""
LONGEST_NAME = 32
"""Characters of a domain's name on the console."""
SCALARS = ("reward", "loss", "grad_norm", "lr", "clip_fraction", "drift", "entropy", "response_length")


def reward_stats(groups: Iterable[Group]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, spread and saturation of the reward and of each term, by domain, over the samples that have a reward.

    Returns:
        {domain: {"reward" or term: {"mean", "std" (over samples, biased), "saturated"}}}, where "saturated" is the
        share of prompt groups in which the value is the same for all responses (to 1e-6): there it teaches nothing.
    """
    values: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        of_group: dict[str, list[float]] = defaultdict(list)
        for sample in group:
            if sample.reward is not None:
                for name, value in {"reward": sample.reward, **sample.terms}.items():
                    of_group[name].append(value)
        for name, found in of_group.items():
            values[group[0].row.domain][name].append(found)
    return {domain: {name: _stats(found) for name, found in terms.items()} for domain, terms in sorted(values.items())}


def _stats(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    flat = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups])
    same = [max(group) - min(group) <= 1e-6 for group in groups]
    return {"mean": float(flat.mean()), "std": float(flat.std()), "saturated": float(np.mean(same))}


def rollout_summary(rollout: Rollout) -> dict[str, Any]:
    """What metrics.jsonl says of a rollout as a whole: of the prompts drawn first, and how they were refilled."""
    samples = [sample for group in rollout.first for sample in group]
    valid = [s for s in samples if s.reward is not None]
    degenerate = [not (kept is group and advantages.any()) for group, kept, advantages in
                  zip(rollout.first, rollout.groups, rollout.advantages, strict=True)
                  if any(s.reward is not None for s in group)]
    return {
        "reward": math.fsum(s.reward for s in valid if s.reward is not None) / max(len(valid), 1),
        "rewards": reward_stats(rollout.first), "failed": len(samples) - len(valid),
        "degenerate_groups": sum(degenerate) / max(len(degenerate), 1),
        "response_length": sum(len(s.response.ids) for s in samples) / len(samples),
    } | ({"refill": rollout.refill} if rollout.refill else {}) | ({
        "filtered": sum(s.reward is not None and not rollout.teaches(s) for s in rollout.samples),
    } if rollout.filtered else {})


def judges_took(scorer: Scorer) -> dict[str, Any]:
    """What the judges' endpoints did since the last time, for a line of metrics.jsonl; all ranks call it together.

    Returns:
        {"judging": {judges of an endpoint: sums over the ranks of `Scorer.taken`}}; {} without judges.
    """
    ranks = together(scorer.taken)
    if not ranks[0]:
        return {}
    return {"judging": {
        endpoint: {name: round(sum(took[endpoint].get(name, 0) for took in ranks), 4)
                   for name in dict.fromkeys(name for took in ranks for name in took[endpoint])}
        for endpoint in ranks[0]
    }}


def step_line(result: StepResult, told: Mapping[str, Any], clock: Mapping[str, float],
              sampled: int) -> dict[str, Any]:
    """The fields of metrics.jsonl that come with an optimizer step.

    Args:
        told: of its rollout. clock: seconds by phase. sampled: response tokens of the rollout.
    """
    return {
        "loss": result.loss, "grad_norm": result.grad_norm, "lr": result.learning_rate,
        "skipped": not result.finite, **told,
        "clip_fraction": result.clip_fraction, "drift": result.drift, "entropy": result.entropy,
        "response_tokens": result.response_tokens, "seconds": {k: round(v, 4) for k, v in clock.items()},
        "tokens_per_second": tokens_per_second(clock, result.response_tokens, sampled),
    }


def tokens_per_second(clock: Mapping[str, float], updated: int, sampled: int) -> dict[str, float]:
    """Response tokens per second of each phase but `data`: of the update, or of the whole rollout in all others.

    Args:
        clock: seconds by phase.
        updated: response tokens of the update. sampled: of the rollout.
    """
    return {phase: round((updated if phase == "update" else sampled) / seconds, 1)
            for phase, seconds in clock.items() if phase != "data" and seconds > 0}


def sample_lines(rollout: Rollout, count: int, step: int) -> list[dict[str, Any]]:
    """A spread of samples for samples.jsonl; `step` is the first that trains on them."""
    samples = list(zip(rollout.samples, np.concatenate(rollout.advantages).tolist(), strict=True))
    stride = max(len(samples) // count, 1) if count else len(samples) + 1
    return [{"step": step, "id": s.id, "domain": s.row.domain, "text": s.response.text, "reward": s.reward,
             "terms": s.terms, "advantage": advantage, "finish_reason": s.response.finish_reason, "failure": s.failure}
            for s, advantage in samples[::stride][:count]]


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl or samples.jsonl; [] when there is none.

    A last line without its newline was cut off by a kill and is left out.
    Raises:
        UserError: a line is no JSON object with a step.
    """
    path = Path(path)
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            found = strict_json.loads(line.decode())
        except ValueError as error:  # a UnicodeDecodeError too
            raise UserError(f"{path}:{number}: not JSON ({error}); restore the file or remove the line") from error
        if not isinstance(found, dict) or type(found.get("step")) is not int:
            raise UserError(f"{path}:{number}: no object with a whole number as its `step`; restore the file or remove "
                            "the line")
        lines.append(found)
    return lines


def _tell_gaps(path: Path, rows: list[dict], step: int) -> None:
    """Warn where steps 1 to `step` have not one line each, in order: training does not need them, its report does."""
    steps = [row["step"] for row in rows]
    spans: list[list[int]] = []
    for number in sorted(set(range(1, step + 1)).difference(steps)):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    if spans:
        named = ", ".join("-".join(map(str, span)) for span in spans[:10])
        more = f" and {len(spans) - 10} more places" if len(spans) > 10 else ""
        logger.warning("%s has no line of step %s%s, of %d done: the report will be without; restore the file and "
                       "repeat the command, or go on so", path, named, more, step)
    if steps != sorted(set(steps)):
        logger.warning("%s has lines twice or out of order, and so will the report; restore the file and repeat the "
                       "command, or go on so", path)


class MetricsWriter:
    """Writes a stage's FILES and, when asked, TensorBoard event files.

    Args:
        stage_dir: the stage's folder.
        tensorboard: write RUN/stageN/tensorboard too.

    `rewind` comes before the first line.
    """

    def __init__(self, stage_dir: str | Path, tensorboard: bool) -> None:
        self.stage_dir = Path(stage_dir)
        self._tensorboard = tensorboard
        self._board: SummaryWriter | None = None
        self._rewound = False

    def path(self, name: str) -> Path:
        """NAME.jsonl; a name of FILES."""
        assert name in FILES, name
        return self.stage_dir / f"{name}.jsonl"

    def append(self, name: str, *rows: dict[str, Any]) -> None:
        """Append lines to a file of FILES, each with its `step`; a value that is not finite is written as null.

        Raises:
            UserError: it cannot be written.
        """
        assert self._rewound, "lines of an earlier try may still be there: call rewind first"
        path = self.path(name)
        if not rows:
            return
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, rows)))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; free space, then repeat the command "
                            "to continue from the last checkpoint") from error
        self._show(name, rows)

    def rewind(self, step: int) -> None:
        """Cut all files back to the lines of steps <= `step`, the checkpoint's; TensorBoard is rebuilt from them.

        Lines of metrics.jsonl that are missing are told.
        """
        self._rewound = True
        for name, path in ((name, self.path(name)) for name in FILES):
            if name not in ALWAYS and not path.exists():
                continue
            kept = [row for row in read_metrics(path) if row["step"] <= step]
            if name == "metrics":
                _tell_gaps(path, kept, step)
            replace_file(path, "".join(map(_line, kept)))
        if not self._tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = self.stage_dir / "tensorboard"
        if self._board is not None:
            self._board.close()
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._board = SummaryWriter(str(folder))
        for name in CHARTED:
            self._show(name, read_metrics(self.path(name)))

    def sync(self) -> None:
        """Bring what was written to disk; called before a checkpoint refers to it."""
        for path in map(self.path, FILES):
            if path.exists():  # some only once there is a line for them
                fsync(path)
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None

    def _show(self, name: str, rows: Sequence[dict]) -> None:
        if self._board is None or name not in CHARTED:
            return
        for row in rows:
            for scalar, value in _scalars(row):
                if scalar not in ("step", "iteration"):
                    self._board.add_scalar(scalar, value, row["step"])


def _line(row: dict) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value):
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(nested: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


class Stderr(logging.Handler):
    """Logs to what sys.stderr is by then: that of the progress bar, while there is one, which draws over any other."""

    def emit(self, record: logging.LogRecord) -> None:
        """Rows and domains are named by a user's data: nothing of theirs may steer the terminal."""
        print("\n".join(map(printable, self.format(record).split("\n"))), file=sys.stderr, flush=True)


class ProgressView:
    """A progress bar with the last step's numbers on a terminal; elsewhere one plain line a step.

    Args:
        total: optimizer steps of the stage.
        done: steps done already.
        title: what runs, as "stage 2".
    """

    def __init__(self, total: int, done: int = 0, title: str = "", console: Console | None = None) -> None:
        self._console = console or Console()
        self._total, self._title = total, title
        self._bar = Progress(TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
                             TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task(title, total=total, completed=done)
        self._live = Live(self._bar, console=self._console) if self._console.is_terminal else None
        if self._live is not None:
            self._live.start()

    def update(self, line: dict) -> None:
        """Show one step's metrics, as a line of metrics.jsonl."""
        self._bar.update(self._task, completed=line["step"])
        if self._live is not None:
            self._live.update(Stack(*_tables(line, self._console.width), self._bar))
        else:
            text = f"{self._title}  step {line['step']}/{self._total}  {summary(line)}"
            print(text.strip(), file=self._console.file, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def summary(line: dict) -> str:
    """One step's metrics in one line of text."""
    parts = [f"{name} {_number(line[name])}" for name in SCALARS if name in line]
    domains = {domain: terms["reward"]["mean"] for domain, terms in line.get("rewards", {}).items()}
    if domains:
        parts.insert(1, "(" + ", ".join(f"{_name(domain)} {_number(value)}" for domain, value in domains.items()) + ")")
    speeds = line.get("tokens_per_second", {})
    parts += [f"{phase} {_number(value)} tokens/s" for phase, value in speeds.items()]
    return "  ".join(parts)


def _tables(line: dict, width: int) -> list[Text | Table]:
    shown = {name: line[name] for name in SCALARS if name in line}
    shown |= {f"{phase} tokens/s": value for phase, value in line.get("tokens_per_second", {}).items()}
    # Lines that break between the numbers only: a row of a table would cut 1e-06 to 1e-... at 80 columns.
    parts = [f"{name} {_number(value)}".replace(" ", NO_BREAK) for name, value in shown.items()]
    numbers = Text(textwrap.fill("  ".join(parts), width).replace(NO_BREAK, " "))
    numbers.highlight_words(list(shown), style="dim")
    rewards = line.get("rewards", {})
    if not rewards:
        return [numbers]
    terms = list(dict.fromkeys(term for by_term in rewards.values() for term in by_term))
    each = max(1, (width - NAME_WIDTH) // (WIDEST + 2))  # the terms of one table: more would cut their numbers
    return [numbers, *(_terms(rewards, terms[i:i + each]) for i in range(0, len(terms), each))]


def _terms(rewards: Mapping[str, Mapping[str, Mapping[str, float]]], terms: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("domain", overflow="fold", min_width=6)
    for term in terms:
        table.add_column(Text(term), justify="right", min_width=WIDEST, overflow="fold")
    for domain, by_term in rewards.items():
        table.add_row(Text(_name(domain)), *(_number(by_term[term]["mean"]) if term in by_term else "-"
                                             for term in terms))
    return table


def _name(domain: str) -> str:
    """As it can be shown: a user's data names it."""
    shown = printable(domain)
    return shown if len(shown) <= LONGEST_NAME else f"{shown[:LONGEST_NAME - 3]}..."


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
