"""What every test of the fault suite has: the account, and the choice between the short and the long form."""

import pytest
from fault_account import Account, table

_ACCOUNT = pytest.StashKey[Account]()


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    """The table to which a test adds its row."""
    return request.config.stash.setdefault(_ACCOUNT, Account())


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Says whether the long form was asked for (--long)."""
    return bool(request.config.getoption("--long"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the table."""
    account = config.stash.get(_ACCOUNT, None)
    if account is None:
        return
    terminalreporter.section("faults")
    for line in table(account):
        terminalreporter.write_line(line)
