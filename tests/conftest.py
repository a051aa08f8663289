"""Shared fixtures."""

from __future__ import annotations

import pytest
import saccade
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=saccade.backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
