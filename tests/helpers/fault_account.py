"""The account of the fault suite: what was broken, how often, and what was lost or wrong afterwards."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest


@dataclass
class Account:
    """The rows of the table that ends a run of the suite."""

    rows: list[tuple[str, str, int, int, int]] = field(default_factory=list)

    def add(self, fault: str, how: str, *, cases: int, lost: int = 0, wrong: int = 0) -> None:
        """Notes what one test has seen, and fails it unless it had cases and nothing was lost or wrong.

        Args:
            fault: what was broken.
            how: how it was injected.
            cases: how many times.
            lost: things that had been acknowledged and are no longer there.
            wrong: things that were served and are not what was stored.
        """
        self.rows.append((fault, how, cases, lost, wrong))
        assert cases > 0, f"{fault}: nothing was tried"
        assert lost == wrong == 0, f"{fault}: of {cases} cases {lost} lost and {wrong} wrong"


ACCOUNT = pytest.StashKey[Account]()  # of the account of a run, in its configuration


def table(account: Account) -> Iterator[str]:
    """Yields the lines of the table, in Markdown; rows of one fault and method are added up."""
    sums: dict[tuple[str, str], list[int]] = {}
    for fault, how, *counts in account.rows:
        sums[fault, how] = [a + b for a, b in zip(sums.get((fault, how), [0, 0, 0]), counts, strict=True)]
    yield "| fault | how | cases | lost | wrong |"
    yield "|---|---|---|---|---|"
    for (fault, how), (cases, lost, wrong) in sorted(sums.items()):
        yield f"| {fault} | {how} | {cases:,} | {lost} | {wrong} |"
