"""The terms of a run, from its settings and from what its rows hold."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row

from ..config import RewardConfig
from ..judges.judge import open_judges
from .base import Term
from .format import Format
from .function import load_function
from .helpful import Helpful
from .judge_term import JudgeTerm
from .math_rule import MathRule
from .safety import Hybrid, SafeGRPO
from .scorer import Scorer
from .task_aware import TaskAware, needs_answer
from .visual_focus import Elements, Grounded

SAFETY_JUDGES = ("safework_safety", "qwen3guard", "llama_guard_4")
BY_TASK = {"value": "safework_value", "knowledge": "safework_knowledge", "general": "general"}


@dataclass(frozen=True, slots=True)
class Roles:
    """Which of the judges named decides what."""

    by_task: dict[str, str]
    """Task -> its judge's name, or "safegrpo" or "hybrid"; by rule where it is missing."""
    helpful: str
    """The judge of Helpful; "": by rule."""
    grounded: bool
    """A judge decides Visual-Focus."""


def roles_of(config: RewardConfig) -> Roles:
    """What the judges named, and `safety`, decide.

    Raises:
        UserError: several judges of one thing, or the judges of `safety` are missing or do not fit.
    """
    entries = {entry.judge: entry for entry in config.judge_entries()}
    by_task = {task: name for task, name in BY_TASK.items() if name in entries}
    guards, hybrid = [name for name in SAFETY_JUDGES if name in entries], config.safety == "hybrid"
    if hybrid:
        if "qwen3guard" not in entries or "scalar" not in entries:
            raise UserError(f"the hybrid reward needs the judges qwen3guard and scalar, not {', '.join(entries)}")
        if (activation := entries["scalar"].activation) != "none":
            raise UserError(f"the hybrid reward takes raw scores, and judge scalar has activation={activation}; drop "
                            "it")
    elif config.safety == "judge" and len(guards) > 1:
        raise UserError(f"safety rows have several judges, {', '.join(guards)}; name one of them")
    if config.safety != "judge":
        by_task |= dict.fromkeys(("safety", "jailbreak"), config.safety)
    elif guards:
        by_task |= {"safety": guards[0],
                    "jailbreak": "safework_jailbreak" if guards[0] == "safework_safety" else guards[0]}
    if {"helpful", "scalar"} <= entries.keys() and not hybrid:
        raise UserError("helpfulness has two judges, helpful and scalar; name one of them")
    helpful = "helpful" if "helpful" in entries else "scalar" if "scalar" in entries and not hybrid else ""
    if "visual_focus" in entries and config.visual_focus_mode == "contrast":
        raise UserError("--reward.visual-focus-mode contrast and judge visual_focus both score Visual-Focus; drop one")
    return Roles(by_task, helpful, "visual_focus" in entries)


def weights_of(config: RewardConfig) -> dict[str, float]:
    """The weights above 0, by term.

    Raises:
        UserError: there are none, or refusal_value is outside [0, 1].
    """
    if not 0 <= config.refusal_value <= 1:
        raise UserError(f"--reward.refusal-value is {config.refusal_value}; give a value in [0, 1]")
    weights = {"format": config.format, "visual_focus": config.visual_focus, "helpful": config.helpful,
               "task_aware": config.task_aware, "function": config.function_weight if config.function else 0.0}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise UserError("every reward weight is 0; give one of --reward.format, --reward.visual-focus, "
                        "--reward.helpful, --reward.task-aware a value above 0, or name a --reward.function")
    return weights


class RowNeeds:
    """What the rows ask of a run's rewards: one rank of a host looks at each row, the others load what it found."""

    def __init__(self, config: RewardConfig) -> None:
        """
        Raises:
            UserError: no term has a weight, refusal_value is outside [0, 1], or the judges do not fit.
        """
        self.weights, self.roles = weights_of(config), roles_of(config)
        self.rules = TaskAware(config.refusal_value, MathRule())
        self.tasks: set[str] = set()
        """Of all rows."""
        self.ruled: set[str] = set()
        """Of the rows that Task-Aware scores by rule."""
        self.elements: set[str] = set()
        """Key elements of all rows."""

    def problem(self, row: Row) -> str:
        """Take the row in; why Task-Aware cannot score it, and the mend, or "" if it can.

        Raises:
            MissingPackage: as `TaskAware.problem`.
        """
        self.tasks.add(row.task)
        self.elements.update(row.key_elements)
        if "task_aware" not in self.weights:
            return ""
        judged = row.task in self.roles.by_task
        if row.task == "value" and not row.answer and not judged:
            return (f"there is no reward rule for task value without `answer`; add it, name judge {BY_TASK['value']} "
                    "in --reward.judges, or set --reward.task-aware 0")
        if judged:
            return needs_answer(row)
        problem = needs_answer(row)
        if not problem:
            self.ruled.add(row.task)
        return problem or self.rules.problem(row)

    def state_dict(self) -> dict[str, list[str]]:
        """What was found, JSON-able."""
        return {name: sorted(getattr(self, name)) for name in ("tasks", "ruled", "elements")}

    def load_state_dict(self, state: Mapping[str, Iterable[str]]) -> None:
        """Take over what another one found."""
        for name in ("tasks", "ruled", "elements"):
            setattr(self, name, set(state[name]))


def build_scorer(config: RewardConfig, needs: RowNeeds, *, patience_s: float = 30.0) -> Scorer:
    """The terms with a weight above 0.

    Args:
        needs: of the same settings, once it has seen all rows that will be scored.
        patience_s: with a judge's server that is away; see `Breaker`.
    Raises:
        UserError: a judge's key is missing or the folder of verdicts cannot be written; the user's function cannot be
            loaded, or scores none of the tasks that the rows have.
    """
    function = load_function(config.function, config.function_tasks) if "function" in needs.weights else None
    if function and needs.tasks and function.tasks and not function.tasks & needs.tasks:
        raise UserError(f"--reward.function-tasks names {', '.join(sorted(function.tasks))}, and the rows have "
                        f"{', '.join(sorted(needs.tasks))}; name one of these")
    clients, roles = open_judges(config, patience_s=patience_s), needs.roles
    ask = lambda name: JudgeTerm(clients[name], both=config.judge_thinking)

    def judge_of(name: str) -> Term:
        if name == "safegrpo":
            return SafeGRPO()
        return Hybrid(clients["qwen3guard"], clients["scalar"]) if name == "hybrid" else ask(name)

    terms: dict[str, Term] = {
        "format": Format(),
        "visual_focus": Grounded(clients["visual_focus"]) if roles.grounded else Elements(needs.elements),
        "helpful": Helpful(ask(roles.helpful) if roles.helpful else None),
        "task_aware": TaskAware(config.refusal_value, needs.rules.math,
                                {task: judge_of(name) for task, name in roles.by_task.items()}),
    }
    if function:
        terms["function"] = function
    if config.visual_focus_mode == "contrast":
        del terms["visual_focus"]
    judged = {"visual_focus": roles.grounded, "helpful": roles.helpful, "task_aware": roles.by_task}
    return Scorer({name: term for name, term in terms.items() if name in needs.weights}, needs.weights,
                  clients if any(map(judged.get, needs.weights)) else {})
