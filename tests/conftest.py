"""Shared fixtures: ultralytics stays offline and out of the user's home, every test starts from one seed."""

import os
import tempfile

os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="fxprune-yolo-"))
os.environ.setdefault("YOLO_VERBOSE", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
