"""The fused forms on NVIDIA GPUs: Triton kernels of our own and of liger-kernel beside the products, flash attention.

Every call of liger-kernel is in this folder, and every kernel of ours. `limits.py` holds what they take: it decides the
choice of forms, and is checked again before a call.
"""
