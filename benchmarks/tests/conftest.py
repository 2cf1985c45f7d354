"""Fixtures of all tests of the benchmarks."""

import pytest
import torch

from tests.helpers.environment import set_environment

set_environment()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
