"""What every test of the fault suite has: the account, and the choice between the short and the long form."""

import pytest
from fault_account import ACCOUNT, Account


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    """The table to which a test adds its row."""
    return request.config.stash.setdefault(ACCOUNT, Account())


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Says whether the long form was asked for (--all)."""
    return bool(request.config.getoption("--all"))
