"""Packaging of modellink; versions are ranges here, requirements.txt pins what CI uses."""

from setuptools import find_packages, setup

setup(
    name="modellink",
    version="0.1.0",
    description="Train, tune, convert and serve Qwen1.5 the Megatron way on NPUs, GPUs and CPUs",
    packages=find_packages(include=["modellink", "modellink.*"]),
    package_data={"modellink": ["**/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.17,<6",
        "safetensors>=0.8",
        "datasets>=4",
        "numpy>=2",
        "sentencepiece>=0.2",
        "psutil>=6",
        "tqdm>=4.66",
    ],
    extras_require={
        "npu": ["torch-npu==2.13.0", "torch==2.13.0", "pyyaml"],
        "cuda": ["liger-kernel>=0.8.5,<0.9"],
        "eval": ["lm-eval>=0.4.13"],
        "dev": [
            "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.15",
            "mypy>=1.18", "pre-commit>=4", "matplotlib>=3.9", "plotext>=6.1", "tensorboard>=2.18", "rich-argparse>=1.7",
            "peft>=0.21,<0.22", "trl>=1.16,<2", "dashscope>=2.0", "tiktoken>=0.9",
        ],
    },
    entry_points={"console_scripts": ["modellink = modellink.cli:main"]},
)
