"""Shim for tools that still ask for setup.py; the metadata live in pyproject.toml."""

from setuptools import setup

setup()
