"""Checks a job once in a plain process, starts its ranks on this node, and tells which of them failed first."""
