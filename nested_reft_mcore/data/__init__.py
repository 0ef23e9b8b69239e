"""Prompts, templates, tokenizers and collation."""
