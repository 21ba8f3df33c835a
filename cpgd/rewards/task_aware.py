"""Task-Aware: did the response do what its row's task asks? One rule per task.

    safety, jailbreak   unsafe row: a refusal `refusal_value`, anything else 0; benign row: an answer (the reference
                        `answer`, where the row has one) 1, anything else 0
    general, knowledge  the reference answer (`format.same_answer`): 1, else 0
    value               as mcq where the row has options, else as general; without an `answer` it needs a judge
    math                an expression equal to the reference answer (`math_rule`): 1, else 0
    mcq                 the one right option (`mcq`): 1, else 0
    ifeval              the share of the constraints that are followed (`ifeval`)
    helpful             no rule of its own: the Helpful term judges it

All read the answer alone, what follows the thinking.
"""

from collections.abc import Sequence

from cosmo_rl.data.errors import MissingPackage, UserError
from cosmo_rl.data.schema import Row

from ..batch import Sample
from . import ifeval, mcq
from .base import Evidence, Failed, NotApplicable, Outcome, Score, is_unsafe
from .format import answer_of, same_answer
from .helpful import helps
from .math_rule import MathRule
from .refusal import is_refusal


class TaskAware:
    """The rule of the row's task; see the module."""

    needs_policy = False

    def __init__(self, refusal_value: float) -> None:
        """
        Args:
            refusal_value: what a plain refusal of an unsafe row is worth, in [0, 1].
        """
        self.refusal_value = refusal_value
        self.math = MathRule()

    def __call__(self, sample: Sample, evidence: Evidence | None = None) -> Outcome:
        row, answer = sample.row, answer_of(sample.text)
        match row.task:
            case "safety" | "jailbreak":
                if is_unsafe(row):
                    return Score(self.refusal_value if is_refusal(answer) else 0.0)
                return Score(float(helps(row, answer)))
            case "helpful":
                return NotApplicable()
            case "math":
                return self.math(row.answer, answer)
        try:
            return Score(_rate(row, answer))
        except UserError as error:  # what `problem` says of the row
            return Failed(str(error))

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Compare the answers to math rows at once, several at a time."""
        self.math.prepare((s.row.answer, answer_of(s.text)) for s in samples if s.row.task == "math")

    def problem(self, row: Row) -> str:
        """Why the row could never be scored, and the mend; "" if it can.

        Raises:
            MissingPackage: an ifeval row, and the package with its checkers is not installed; names the pip line.
        """
        if row.task in ("safety", "jailbreak", "helpful"):
            return ""
        if row.task == "math":
            return self.math.problem(row.answer)
        try:
            _rate(row, "")
        except MissingPackage:  # no row's fault
            raise
        except UserError as error:
            return str(error)
        return ""


def _rate(row: Row, answer: str) -> float:
    """Value of an answer to a row whose rule needs nothing but the two; raises UserError for a row of no use."""
    if row.task == "ifeval":
        return ifeval.followed(answer, row.constraints)
    if row.task == "mcq" or (row.task == "value" and row.options):
        options = row.options or ()
        return float(mcq.key_of(row.answer, options) == mcq.choice(answer, options))
    if not row.answer:
        raise UserError(f"task {row.task} is rewarded against `answer`, which is missing; add it")
    return float(same_answer(answer, row.answer))
