"""Shipped recipes (YAML data)."""
