"""Measurements behind the figures of the README; README.md in this folder says which command makes which."""

import os

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
"""Entries in oneDNN's cache of kernels. With the default of 1024, models timed in turn evict each other's kernels."""
