"""Memory and time models."""
