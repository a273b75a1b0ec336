import time

import pytest
from bounds import in_child


def test_the_answer_and_the_memory_of_a_child_come_back():
    assert in_child(lambda: [1, "two"])[0] == [1, "two"]
    assert in_child(lambda: len(bytes(1)) and None)[1] < 20_000_000
    assert in_child(lambda: len(bytearray(b"x") * 100_000_000))[1] > 90_000_000


def test_a_child_that_raises_dies_or_hangs_is_a_failure():
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        in_child(lambda: 1 / 0)
    with pytest.raises(pytest.fail.Exception, match=r"not done after 0\.1 seconds"):
        in_child(lambda: time.sleep(60), seconds=0.1)
