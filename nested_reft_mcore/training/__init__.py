"""The loop, the update, the supervised warm-up, evaluation, state and metrics."""
