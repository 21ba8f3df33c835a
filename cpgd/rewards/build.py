"""The terms of a run, from its settings and from what its rows hold."""

from collections.abc import Iterable, Mapping

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row

from ..config import RewardConfig
from ..judges.judge import open_judges
from .base import Term
from .format import Format
from .function import load_function
from .helpful import Helpful
from .judge_terms import Grounded, Hybrid, JudgeTerm, SafeGRPO
from .scorer import Scorer
from .task_aware import TaskAware, needs_answer
from .visual_focus import Elements

SAFETY_JUDGES = ("safework_safety", "qwen3guard", "llama_guard_4")
BY_TASK = {"value": "safework_value", "knowledge": "safework_knowledge", "general": "general"}


class RowNeeds:
    """What the rows ask of a run's rewards: one rank of a host looks at each row, the others load what it found."""

    def __init__(self, config: RewardConfig) -> None:
        """
        Raises:
            UserError: no term has a weight, refusal_value is outside [0, 1], or the judges do not fit: several of one
                thing, or those of `safety` are missing.
        """
        if not 0 <= config.refusal_value <= 1:
            raise UserError(f"--reward.refusal-value is {config.refusal_value}; give a value in [0, 1]")
        weights = {"format": config.format, "visual_focus": config.visual_focus, "helpful": config.helpful,
                   "task_aware": config.task_aware, "function": config.function_weight if config.function else 0.0}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        """Of the run's terms, by name."""
        if not self.weights:
            raise UserError("every reward weight is 0; give one of --reward.format, --reward.visual-focus, "
                            "--reward.helpful, --reward.task-aware a value above 0, or name a --reward.function")
        self.task_judges, self.helpful_judge = _assigned(config)
        self.rules = TaskAware(config.refusal_value)
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
        judged = row.task in self.task_judges
        if row.task == "value" and not row.answer and not judged:
            return (f"there is no reward rule for task value without `answer`; add it, name judge {BY_TASK['value']} "
                    "in --reward.judges, or set --reward.task-aware 0")
        if judged:
            return needs_answer(row)
        self.ruled.add(row.task)
        return self.rules.problem(row)

    def state_dict(self) -> dict[str, list[str]]:
        """What was found, JSON-able."""
        return {name: sorted(getattr(self, name)) for name in ("tasks", "ruled", "elements")}

    def load_state_dict(self, state: Mapping[str, Iterable[str]]) -> None:
        """Take over what another one found."""
        for name in ("tasks", "ruled", "elements"):
            setattr(self, name, set(state[name]))


def _assigned(config: RewardConfig) -> tuple[dict[str, str], str]:
    """Who decides Task-Aware, a judge's name or that of `safety`, by task, and the judge of Helpful; else the rules do.

    Raises:
        UserError: see `RowNeeds`.
    """
    entries, hybrid = {entry.judge: entry for entry in config.judge_entries()}, config.safety == "hybrid"
    by_task = {task: name for task, name in BY_TASK.items() if name in entries}
    guards = [name for name in SAFETY_JUDGES if name in entries]
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
    helpful = [name for name in ("helpful", "scalar") if name in entries and not (name == "scalar" and hybrid)]
    if len(helpful) > 1:
        raise UserError("helpfulness has two judges, helpful and scalar; name one of them")
    if "visual_focus" in entries and config.visual_focus_mode == "contrast":
        raise UserError("--reward.visual-focus-mode contrast and judge visual_focus both score Visual-Focus; drop one")
    return by_task, "".join(helpful)


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
    clients = open_judges(config, patience_s=patience_s)

    def deciding(name: str) -> Term:
        if name == "safegrpo":
            return SafeGRPO()
        if name == "hybrid":
            return Hybrid(clients["qwen3guard"], clients["scalar"])
        return JudgeTerm(clients[name], both=config.judge_thinking)

    judges = {task: deciding(name) for task, name in needs.task_judges.items()}
    terms: dict[str, Term | None] = {
        "format": Format(),
        "visual_focus": None if config.visual_focus_mode == "contrast"
        else Grounded(clients["visual_focus"]) if "visual_focus" in clients else Elements(needs.elements),
        "helpful": Helpful(deciding(needs.helpful_judge) if needs.helpful_judge else None),
        "task_aware": TaskAware(config.refusal_value, needs.rules.math, judges),
        "function": function,
    }
    asks = {"visual_focus": "visual_focus" in clients, "helpful": needs.helpful_judge, "task_aware": judges}
    return Scorer({name: term for name in needs.weights if (term := terms[name])}, needs.weights,
                  clients if any(map(asks.get, needs.weights)) else {})
