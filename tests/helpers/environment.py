"""Environment variables of test runs."""

from __future__ import annotations

import os
import tempfile

import torch


def set_environment() -> None:
    """Keep ultralytics offline and out of the user's home, and oneDNN's cache large; call it before either is used."""
    os.environ.setdefault("YOLO_OFFLINE", "1")
    if "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="fxprune-yolo-")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")  # many models in one process share this cache
    if "PYTEST_XDIST_WORKER" in os.environ:  # one core each: threads that wait for each other take several times longer
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
