"""Typed configuration: schema, strict loading, and the errors a user can cause. Imports without torch."""
