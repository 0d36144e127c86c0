"""The training loop and its parts. Modules here import megatron.core: import them after `modellink.start`."""
