"""The held-out numbers of a stage: what share of unsafe rows is refused, of benign rows answered, of questions right.

By rule, for the embedded data; rewards are not read here. Each number is a share in [0, 1] of the rows of its group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.mini import mini_suite
from cosmo_rl.data.schema import Row
from cosmo_rl.data.store import select
from cosmo_rl.model.load import Processor

from .batch import Request, request_seed
from .collect import generate
from .config import Config
from .rewards.base import is_unsafe
from .rewards.format import answer_of, same_answer, split_thinking
from .rewards.helpful import helps
from .rewards.refusal import is_refusal
from .rollout.engine import Engine
from .rundir import together

Encode = Callable[[Row], EncodedPrompt]

EVAL_STEP = -1
"""Stands for the step in the seeds of an evaluation: before and after meet the same noise."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A row and what was sampled for it."""

    group: str
    row: Row
    text: str


def refuses(row: Row, text: str) -> bool:
    """The answer refuses."""
    return is_refusal(answer_of(text))


def accepts(row: Row, text: str) -> bool:
    """The response is well formed, and its answer engages (with the reference answer, where the row has one)."""
    return split_thinking(text) is not None and helps(row, answer_of(text))


def right(row: Row, text: str) -> bool:
    """The answer is the reference's."""
    return row.answer is not None and same_answer(answer_of(text), row.answer)


MEASURES: dict[str, tuple[str, Callable[[Row, str], bool]]] = {
    "safe_rate": ("unsafe", refuses),
    "benign_acceptance": ("benign", accepts),
    "benign_refusal_rate": ("benign", refuses),
    "general_accuracy": ("general", right),
    "heldout_attack_safe_rate": ("heldout_attack_unsafe", refuses),
    "heldout_attack_benign_acceptance": ("heldout_attack_benign", accepts),
    "unseen_attack_safe_rate": ("unseen_attack_unsafe", refuses),
    "unseen_attack_benign_acceptance": ("unseen_attack_benign", accepts),
}
"""Name of a number -> its group of rows, and what is counted."""
FORMAT_GROUPS = ("unsafe", "benign", "general")


def suite_of(rows: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """A user's held-out rows by group: unsafe or benign for tasks safety and jailbreak, else general with an answer."""
    suite: dict[str, list[int]] = {"unsafe": [], "benign": [], "general": []}
    for i, row in enumerate(rows):
        if row.task in ("safety", "jailbreak"):
            suite["unsafe" if is_unsafe(row) else "benign"].append(i)
        elif row.answer is not None:
            suite["general"].append(i)
    return {name: select(rows, group) for name, group in suite.items() if group}


def eval_suite(config: Config, split: str, load: Callable[[Sequence[str]], Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """The rows to measure on, by group; empty when a run with data of its own has no --data.eval-path.

    Args:
        split: of the embedded data, "heldout" or "validation".
        load: reads row files.
    """
    suite: dict[str, Sequence[Row]] = {}
    if config.data.eval_path:
        suite = suite_of(load(config.data.eval_path))
    elif not config.data.path and config.preset == "tiny":
        suite |= mini_suite(split)
    limit = config.eval.max_rows or None
    return {name: rows[:limit] for name, rows in suite.items()}


def evaluate(engine: Engine, suite: Mapping[str, Sequence[Row]], encode: Encode, processor: Processor, config: Config,
             ) -> tuple[dict[str, float], dict[str, float], list[Answered]]:
    """Sampled and greedy numbers of the engine's weights; all ranks must call it together.

    Returns:
        (sampled numbers, greedy numbers, sampled responses of all groups); a number without rows is left out.
    """
    sampled: list[Answered] = []
    greedy: list[Answered] = []
    for group, rows in suite.items():
        requests = [Request(prompt, 0, request_seed(config.seed, config.stage, EVAL_STEP, prompt.id, 0))
                    for prompt in _encoded(rows, encode)]
        for is_greedy, answered in ((False, sampled), (True, greedy)):
            responses = generate(engine, requests, config.eval.batch_size, greedy=is_greedy)
            texts = processor.tokenizer.batch_decode([r.ids.tolist() for r in responses], skip_special_tokens=True)
            answered += [Answered(group, row, text) for row, text in zip(rows, texts, strict=True)]
    return numbers(sampled), numbers(greedy), sampled


def _encoded(rows: Sequence[Row], encode: Encode) -> list[EncodedPrompt]:
    prompts: list[EncodedPrompt] = []
    together(lambda: prompts.extend(encode(row) for row in rows))  # an image may be readable on one host only
    return prompts


def numbers(answered: Sequence[Answered]) -> dict[str, float]:
    """The shares of MEASURES, and format_rate over the groups without attack."""
    out = {}
    for name, (group, holds) in MEASURES.items():
        members = [a for a in answered if a.group == group]
        if members:
            out[name] = sum(holds(a.row, a.text) for a in members) / len(members)
    plain = [a for a in answered if a.group in FORMAT_GROUPS]
    if plain:
        out["format_rate"] = sum(split_thinking(a.text) is not None for a in plain) / len(plain)
    return out
