"""The process in which `math_rule.Workers` compares answers: sympy may never end, take all memory, or crash.

    python -P -m cosmo_rl.cpgd.rewards.math_worker PARENT_PID CPU_SECONDS MEMORY_BYTES

A request is a line of JSON, [gold, answer]. The reply: g (the gold answer cannot be parsed), or p (it can) followed by
1 (equal) or 0; before the last byte an x from a worker that has grown and must be replaced. No reply within CPU_SECONDS
of processor time: the kernel ends the process (SIGPROF), inside a C call too, where a Python signal handler, as
math-verify's own time-out has, would wait. Nothing heavy is imported, above all not torch.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from ..run.process import die_with

RELATIVE = 1e-5
"""Numbers that differ by more are not equal, however small they are."""
NOISE = 1e-60
"""Below it a number is a zero that was not simplified; Planck's constant is 7e-34."""


def compare(gold: str, answer: str, parsed: Callable[[], object]) -> str:
    """"g", "1" or "0"; see the module.

    Args:
        gold, answer: as `math_verify.parse` takes them.
        parsed: called once the gold answer is parsed.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy.core.cache import clear_cache
    from sympy.core.random import seed

    clear_cache()  # what this worker did before must not show
    seed(0)  # sympy tests for zero at random points
    untimed: dict[str, Any] = {"parsing_timeout": None}  # its own would be by signals; None is not annotated
    # Its units are letters too: it would read 2x + 3t as 2x + 3. `math_text.pair` takes them away.
    latex = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    reads = [LatexExtractionConfig(normalization_config=latex), ExprExtractionConfig()]
    golds = parse(gold, reads, **untimed)
    if all(isinstance(found, str) for found in golds):
        return "g"
    parsed()
    answers = parse(answer, reads, **untimed)
    if not answers:
        return "0"
    cases = [(golds, answers), *_hundredths(golds[0], answers[0])]
    return "01"[any(verify(left, right, allow_set_relation_comp=True, timeout_seconds=None)
                    and not _apart(left[0], right[0]) for left, right in cases)]


def _hundredths(left: Any, right: Any) -> list[tuple[list[Any], list[Any]]]:
    """12.5% and 12.5 as 12.5 and 12.5, where one has the sign; not below 1, where 0.5 is rather half of a whole."""
    from math_verify.grader import get_pct_val

    a, b = get_pct_val(left), get_pct_val(right)
    value = _number(a if b is None else b)
    if (a is None) == (b is None) or value is None or abs(value) < 1:
        return []
    return [([left if a is None else a], [right if b is None else b])]


def _number(side: Any) -> complex | None:
    from math_verify.grader import unwrap_eq

    value: Any = unwrap_eq(side)
    try:
        return complex(value)
    except (TypeError, ValueError, AttributeError):
        return None


def _apart(left: Any, right: Any) -> bool:
    """Two numbers that differ by more than RELATIVE: math-verify rounds them to six decimals."""
    a, b = _number(left), _number(right)
    if a is None or b is None:
        return False
    largest = max(abs(a), abs(b))
    return largest > NOISE and abs(a - b) > RELATIVE * largest


def main(parent: int, cpu_s: float, memory_bytes: int) -> None:
    """Answer requests until stdin ends or the parent dies."""
    die_with(parent)  # elsewhere than on Linux the end of stdin must do, once the comparison in progress is over
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable()
    import math_verify  # noqa: F401  # before stderr is closed, and outside the time limit

    replies, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # the LaTeX parser prints
    os.dup2(nowhere, 2)
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        said = compare(gold, answer, lambda: os.write(replies, b"p"))
        signal.setitimer(signal.ITIMER_PROF, 0)
        # A result that some cache still holds would leave the next comparison less memory.
        os.write(replies, (b"x" if _address_space() > memory_bytes / 4 else b"") + said.encode())


def _address_space() -> int:
    """Bytes in use. Not getrusage's ru_maxrss, which begins with that of the parent, the trainer."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
