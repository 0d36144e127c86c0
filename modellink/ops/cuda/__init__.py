"""The fused forms on NVIDIA GPUs: Triton kernels of liger-kernel beside the products, flash attention of torch.

Every call of liger-kernel is in this folder. `limits.py` holds what these kernels take: it decides the choice of forms,
and is checked again before a call.
"""
