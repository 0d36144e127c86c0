"""Weights on disk: one rule table between HF folders and Megatron checkpoints of every layout. Needs torch only."""
