"""Settings, the parser that fills them, and the error a user sees. Needs no torch."""

from modellink.config.errors import ConfigError, run_command

__all__ = ["ConfigError", "run_command"]
