"""`fxprune.demo.bundled` under its earlier name, for one release."""

from fxprune.demo.bundled import build_detector, load_dataset, load_detector

__all__ = ["build_detector", "load_dataset", "load_detector"]
