"""Build hook: everything that setuptools needs stands in pyproject.toml."""

from setuptools import setup

setup()
