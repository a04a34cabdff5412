"""The version of this package, as pyproject.toml gives it; nothing else, so that anyone can ask."""

__version__ = "0.1.0"
