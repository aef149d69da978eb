"""Whose kernels a test is about.

A test marked `backends("triton", "cuda")`, or in a file that is, runs once with each of them as what
kernel_checks.under_test() names; a test's own mark comes before its file's. Unmarked ones are about Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .kernel_checks import kernels_of, unavailable


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("backends")
    if mark is not None:
        metafunc.parametrize("backend", mark.args, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend under test; skips, with the reason, where its kernels cannot run."""
    named: str = getattr(request, "param", "triton")
    if hasattr(request, "param") and (reason := unavailable(named)):
        pytest.skip(reason)
    with kernels_of(named):
        yield named
