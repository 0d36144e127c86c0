"""The hot operations: one plain-torch form each, and what a device can do faster."""
