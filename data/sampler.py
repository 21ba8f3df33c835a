"""The order of prompts: an endless, seeded stream of row numbers in which every domain keeps its share.

Which domain comes next follows the quota method (Balinski and Young, "The Quota Method of Apportionment", American
Mathematical Monthly 82, 1975): of the domains whose count is still below share * total, the one with the largest
share / (count + 1). So after any number of rows each domain's count is within one of share * total, and the stream does
not depend on how it is cut into calls (largest remainders, taken call by call, can ask for a row back). A domain is
walked in a fresh seeded permutation each epoch. The stream knows nothing of ranks: they split what is drawn.
"""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isfinite
from typing import Any

import numpy as np

_ALL = "*"
"""Name of the single stream when there is no mixture."""


class PromptSampler:
    """Draws row numbers; equal arguments and equal state give equal draws on any machine."""

    def __init__(self, domains: Sequence[str], mix: Mapping[str, float], seed: int) -> None:
        """
        Args:
            domains: the domain of each row, (rows,).
            mix: share of each domain, unitless, divided by their sum; a domain of the data that it does not name is
                never drawn. Empty: one permutation over all rows.
            seed: any integer.
        Raises:
            ValueError: no rows, a domain of `mix` without rows, a share that is negative or not finite, or all zero.
        """
        if not domains:
            raise ValueError("there are 0 rows to draw from; name a data set with rows")
        present = sorted(set(domains))
        for name, share in mix.items():
            if name not in present:
                raise ValueError(f"--data.mix names domain {name!r}, which no row has; there are {', '.join(present)}")
            if not isfinite(share) or share < 0:
                raise ValueError(f"--data.mix gives domain {name!r} the share {share}; give a number of at least 0")
        # the decimals as the user wrote them, so that 0.1 of 10 rows is exactly 1
        exact = {name: Fraction(str(share)) for name, share in sorted(mix.items()) if share > 0}
        if mix and not exact:
            raise ValueError(f"--data.mix is {dict(mix)}: every share is 0; give at least one above 0")
        total = sum(exact.values())
        self._shares = {name: share / total for name, share in exact.items()} or {_ALL: Fraction(1)}
        self._rows = {name: np.flatnonzero([name in (_ALL, d) for d in domains]) for name in self._shares}
        self._drawn = dict.fromkeys(self._shares, 0)
        self._seed = seed
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def take(self, n: int) -> list[int]:
        """The next `n` row numbers; a row comes again in its domain's next epoch, which may begin within the call."""
        return [self._next() for _ in range(n)]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, by domain: epochs finished, rows drawn in this one, and rows still owed (a fraction, as text)."""
        return {"epoch": {d: self._drawn[d] // len(self._rows[d]) for d in self._shares},
                "cursor": {d: self._drawn[d] % len(self._rows[d]) for d in self._shares},
                "carry": {d: str(self._owed(d)) for d in self._shares}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state comes from other domains, shares or numbers of rows.
        """
        if sorted(state["cursor"]) != sorted(self._shares):
            raise ValueError(f"the saved sampler has domains {sorted(state['cursor'])}, this one has "
                             f"{sorted(self._shares)}; resume with the same data and --data.mix")
        before, self._drawn = self._drawn, {d: state["epoch"][d] * len(self._rows[d]) + state["cursor"][d]
                                            for d in self._shares}
        if self.state_dict() != state:
            self._drawn = before
            sizes = ", ".join(f"{d}: {len(self._rows[d])} rows, share {share}" for d, share in self._shares.items())
            raise ValueError(f"the saved sampler position {dict(state)} does not fit this data and --data.mix "
                             f"({sizes}); resume with the same ones")

    def _owed(self, domain: str) -> Fraction:
        return self._shares[domain] * sum(self._drawn.values()) - self._drawn[domain]

    def _next(self) -> int:
        total = sum(self._drawn.values()) + 1
        below = [d for d, share in self._shares.items() if self._drawn[d] < share * total]
        domain = max(below, key=lambda d: self._shares[d] / (self._drawn[d] + 1))
        epoch, cursor = divmod(self._drawn[domain], len(self._rows[domain]))
        self._drawn[domain] += 1
        return int(self._order(domain, epoch)[cursor])

    def _order(self, domain: str, epoch: int) -> np.ndarray:
        if self._orders.get(domain, (-1,))[0] != epoch:
            key = hashlib.blake2b(f"{self._seed}/{domain}/{epoch}".encode(), digest_size=16).digest()
            # raw Philox words are stable over numpy versions, Generator.permutation is not promised to be
            words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(self._rows[domain]))
            self._orders[domain] = epoch, self._rows[domain][np.argsort(words, kind="stable")]
        return self._orders[domain][1]
