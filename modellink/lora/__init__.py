"""LoRA adapters on parallel linear layers."""
