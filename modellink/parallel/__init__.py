"""Parallel degrees, process groups and seeds."""
