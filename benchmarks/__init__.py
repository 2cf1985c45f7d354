"""Measurements behind the README's figures; each module is a command."""

import os

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
"""Models that are timed in turn share oneDNN's cache of kernels; at its own 1024, many models push each other out."""
