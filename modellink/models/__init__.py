"""Qwen1.5 models: presets, how the architecture of a run is found, and the model built from megatron-core."""
