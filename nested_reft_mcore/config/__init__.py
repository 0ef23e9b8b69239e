"""Typed configuration: schema, strict loading, and a user's errors. Imports without torch."""
