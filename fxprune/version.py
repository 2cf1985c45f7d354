"""The version of fxprune."""

__version__ = "0.1.0"
