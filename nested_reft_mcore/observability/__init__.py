"""Logging, progress, tracking and timers."""
