"""Nested-ReFT (arXiv 2508.10123) on Megatron-Core."""

__version__ = "0.1.0"
