"""Hypothesis where it is installed; where it is not, the tests that need it are skipped, and only those."""

from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Stands for strategies and options of a test that will not run."""

        def __getattr__(self, _name: str) -> Any:
            return self

        def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
            return self

    st: Any = _Anything()
    HealthCheck: Any = _Anything()

    def given(*_args: Any, **_kwargs: Any) -> Any:
        """Puts a test that is skipped in the place of one whose arguments nobody can supply."""

        @pytest.mark.skip(reason="needs hypothesis")
        def skipped() -> None: ...

        return lambda test: skipped

    def settings(*_args: Any, **_kwargs: Any) -> Any:
        """Leaves the test as it is."""
        return lambda test: test


quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)

__all__ = ["HealthCheck", "given", "quick", "settings", "st"]
