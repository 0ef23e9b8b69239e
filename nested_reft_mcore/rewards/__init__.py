"""Verifiable rewards, one a file, run in worker processes with a deadline."""
