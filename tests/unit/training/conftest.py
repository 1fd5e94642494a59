"""Fixtures of several files."""

from tests.helpers.phases import accelerate  # noqa: F401
