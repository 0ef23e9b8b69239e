"""Rank discovery, local spawning, signals and exit codes."""
