"""Fixtures of several files."""

from tests.helpers.basicsr import folder, opt  # noqa: F401
