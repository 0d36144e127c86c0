"""Train, tune, convert, chat with and serve Qwen1.5 the Megatron way on NPUs, GPUs and plain CPUs.

Importing this package has no side effects and does not import torch.
"""

__version__ = "0.1.0"
