"""Hugging Face layouts: one map per family serves both directions."""
