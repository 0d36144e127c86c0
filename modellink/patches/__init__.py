"""The ledger of changes to megatron-core; the last resort after flags, specs and subclasses."""
