"""Operators without weights."""
