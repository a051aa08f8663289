"""Shared fixtures and the marks of the test-suite."""

from __future__ import annotations

import pytest
import saccade
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: the whole grid, for make test-full only")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=saccade.backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
