import pytest
from fault_account import Account, table


def test_a_test_fails_when_something_was_lost_or_wrong_or_nothing_was_tried():
    account = Account()
    account.add("kill", "at random", cases=3)
    for counts in ({"cases": 0}, {"cases": 2, "lost": 1}, {"cases": 2, "wrong": 1}):
        with pytest.raises(AssertionError, match=r"^kill: "):
            account.add("kill", "at random", **counts)
    assert list(table(account))[-1] == "| kill | at random | 7 | 1 | 1 |"
