"""The order of prompts: an endless, seeded stream of row numbers in which every domain keeps its share.

Which domain comes next follows the quota method (Balinski and Young, "The Quota Method of Apportionment", American
Mathematical Monthly 82, 1975): of the domains whose count is still below share * total, the one with the largest
share / (count + 1). So after any number of rows each domain's count is within one of share * total, and the stream does
not depend on how it is cut into calls (largest remainders, taken call by call, can ask for a row back). A domain is
walked in a fresh seeded permutation each epoch. The stream knows nothing of ranks: they split what is drawn.

Two things walk on in a domain without counting towards its share, so that what is trained on keeps the shares exactly:

    replace      the next row of the same domain, for a row that taught nothing (dynamic sampling, cpgd/selection.py)
    curriculum   a row whose last pass rate lies outside (low, high) is passed over for one epoch, then forgotten: it is
                 drawn again in the next. This is the online filter of MM-Eureka (arXiv:2503.07365: prompts that are
                 always or never solved leave the batch) by the last observation instead of fresh samples, which costs
                 nothing; a hard form of Kimi k1.5's prioritised sampling (arXiv:2501.12599: problems are drawn in
                 proportion to 1 - success rate).
"""

import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isfinite
from typing import Any

import numpy as np

from .errors import UserError

logger = logging.getLogger(__name__)
_ALL = "*"
"""Name of the single stream when there is no mixture."""
_RATE = np.dtype("<f2")
"""Of the pass rates, two bytes a row; NaN: not observed since the row was passed over."""


class PromptSampler:
    """Draws row numbers; equal arguments and equal state give equal draws on any machine."""

    def __init__(self, domains: Sequence[str], mix: Mapping[str, float], seed: int,
                 curriculum: tuple[float, float] = (0.0, 1.0)) -> None:
        """
        Args:
            domains: the domain of each row, (rows,).
            mix: share of each domain, unitless, divided by their sum; a domain of the data that it does not name is
                never drawn. Empty: one permutation over all rows.
            seed: any integer.
            curriculum: lowest and highest pass rate of rows that are drawn, both included; (0, 1): all are.
        Raises:
            UserError: no rows, a domain of `mix` without rows, a share that is negative or not finite, or all zero; a
                curriculum that is not 0 <= low < high <= 1.
        """
        if not domains:
            raise UserError("there are 0 rows to draw from; name a data set with rows")
        present = sorted(set(domains))
        for name, share in mix.items():
            if name not in present:
                raise UserError(f"--data.mix names domain {name!r}, which no row has; there are {', '.join(present)}")
            if not isfinite(share) or share < 0:
                raise UserError(f"--data.mix gives domain {name!r} the share {share}; give a number of at least 0")
        # the decimals as the user wrote them, so that 0.1 of 10 rows is exactly 1
        exact = {name: Fraction(str(share)) for name, share in sorted(mix.items()) if share > 0}
        if mix and not exact:
            raise UserError(f"--data.mix is {dict(mix)}: every share is 0; give at least one above 0")
        total = sum(exact.values())
        self._shares = {name: share / total for name, share in exact.items()} or {_ALL: Fraction(1)}
        self._rows = {name: np.flatnonzero([not exact or name == d for d in domains]) for name in self._shares}
        self._drawn = dict.fromkeys(self._shares, 0)  # rows that count towards the share
        self._walked = dict.fromkeys(self._shares, 0)  # and those that were replaced or passed over
        low, high = curriculum
        if not 0 <= low < high <= 1:
            raise UserError(f"--data.curriculum is {low} {high}; give two pass rates, 0 <= LOW < HIGH <= 1")
        self._curriculum = np.array([low, high], dtype=_RATE) if (low, high) != (0, 1) else None
        self._rates = np.full(len(domains), np.nan, dtype=_RATE)
        self._seed = seed
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def take(self, n: int) -> list[int]:
        """The next `n` row numbers; a row comes again in its domain's next epoch, which may begin within the call."""
        return [self._next() for _ in range(n)]

    def replace(self, rows: Sequence[int]) -> list[int]:
        """For each row number the next one of its domain, which takes its place: the shares do not count it.

        Without a mixture there is one stream, and the next row may be of any domain.
        """
        return [self._walk(next(d for d, members in self._rows.items() if _holds(members, row))) for row in rows]

    def observe(self, rates: Mapping[int, float]) -> None:
        """Remember pass rates in [0, 1] by row number; with a curriculum they decide when a row is drawn next."""
        if self._curriculum is not None:
            self._rates[list(rates)] = list(rates.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, by domain: epochs finished, rows walked in this one, and rows still owed (a fraction, as text).

        Where they are in use also, by domain, `beside`: rows walked that the shares do not count; and `rates`: base64
        of two bytes a row.
        """
        walked = {d: divmod(self._walked[d], len(self._rows[d])) for d in self._shares}
        state: dict[str, Any] = {"epoch": {d: epoch for d, (epoch, _) in walked.items()},
                                 "cursor": {d: cursor for d, (_, cursor) in walked.items()},
                                 "carry": {d: str(self._owed(d)) for d in self._shares}}
        if self._drawn != self._walked:
            state["beside"] = {d: self._walked[d] - self._drawn[d] for d in self._shares}
        if self._curriculum is not None:
            state["rates"] = base64.b64encode(self._rates.tobytes()).decode()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: the state comes from other domains, shares, curriculum or numbers of rows.
        """
        if sorted(state["cursor"]) != sorted(self._shares):
            raise UserError(f"the saved sampler has domains {sorted(state['cursor'])}, this one has "
                            f"{sorted(self._shares)}; resume with the same data and --data.mix")
        before = self._walked, self._drawn, self._rates
        beside = state.get("beside", {})
        self._walked = {d: state["epoch"][d] * len(self._rows[d]) + state["cursor"][d] for d in self._shares}
        self._drawn = {d: walked - beside.get(d, 0) for d, walked in self._walked.items()}
        if "rates" in state:
            self._rates = np.frombuffer(base64.b64decode(state["rates"]), dtype=_RATE).copy()
        if self.state_dict() != state or len(self._rates) != len(before[2]):
            self._walked, self._drawn, self._rates = before
            sizes = ", ".join(f"{d}: {len(self._rows[d])} rows, share {share}" for d, share in self._shares.items())
            position = {key: value for key, value in state.items() if key != "rates"}
            raise UserError(f"the saved sampler position {position} does not fit this data, --data.mix and "
                            f"--data.curriculum ({sizes}); resume with the same ones")

    def _owed(self, domain: str) -> Fraction:
        return self._shares[domain] * sum(self._drawn.values()) - self._drawn[domain]

    def _next(self) -> int:
        total = sum(self._drawn.values()) + 1
        below = [d for d, share in self._shares.items() if self._drawn[d] < share * total]
        domain = max(below, key=lambda d: self._shares[d] / (self._drawn[d] + 1))
        self._drawn[domain] += 1
        return self._walk(domain)

    def _walk(self, domain: str) -> int:
        """The next row of a domain that is not passed over; ends, since a row that is passed over is forgotten."""
        while True:
            epoch, cursor = divmod(self._walked[domain], len(self._rows[domain]))
            if cursor == 0:
                self._begin(domain, epoch)
            row = int(self._order(domain, epoch)[cursor])
            self._walked[domain] += 1
            if not self._outside(row):
                return row
            self._rates[row] = np.nan

    def _begin(self, domain: str, epoch: int) -> None:
        """A domain of which every row would be passed over is walked whole."""
        if self._outside(self._rows[domain]).all():
            logger.info("domain %s: the pass rates of all %d rows lie outside --data.curriculum; epoch %d takes them "
                        "all", domain, len(self._rows[domain]), epoch)
            self._rates[self._rows[domain]] = np.nan

    def _outside(self, rows: int | np.ndarray) -> np.ndarray:
        """Whether these rows have a pass rate outside the curriculum."""
        low, high = (0, 1) if self._curriculum is None else self._curriculum
        return (self._rates[rows] < low) | (self._rates[rows] > high)  # NaN is neither

    def _order(self, domain: str, epoch: int) -> np.ndarray:
        if self._orders.get(domain, (-1,))[0] != epoch:
            key = hashlib.blake2b(f"{self._seed}/{domain}/{epoch}".encode(), digest_size=16).digest()
            # raw Philox words are stable over numpy versions, Generator.permutation is not promised to be
            words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(self._rows[domain]))
            self._orders[domain] = epoch, self._rows[domain][np.argsort(words, kind="stable")]
        return self._orders[domain][1]


def _holds(sorted_rows: np.ndarray, row: int) -> bool:
    at = np.searchsorted(sorted_rows, row)
    return bool(at < len(sorted_rows) and sorted_rows[at] == row)
