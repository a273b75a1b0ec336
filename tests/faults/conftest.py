"""What every test of the fault suite has: the account, and the choice between the short and the long form."""

from typing import Any

import pytest
from fault_account import Account, table

_ACCOUNT = pytest.StashKey[Account]()


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    """The table to which a test adds its row."""
    return request.config.stash.setdefault(_ACCOUNT, Account())


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Says whether the long form was asked for (--all)."""
    return bool(request.config.getoption("--all"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the rows of a process of pytest-xdist to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["fault rows"] = session.config.stash.get(_ACCOUNT, Account()).rows


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes the rows of a process of pytest-xdist that has ended."""
    account = node.config.stash.setdefault(_ACCOUNT, Account())
    account.rows += [tuple(row) for row in getattr(node, "workeroutput", {}).get("fault rows", [])]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the table."""
    account = config.stash.get(_ACCOUNT, None)
    if account is None or not account.rows:
        return
    terminalreporter.section("faults")
    for line in table(account):
        terminalreporter.write_line(line)
