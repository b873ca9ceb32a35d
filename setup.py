import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (HERE / "fairseq_rkm" / "__init__.py").read_text())[1]
# The index's fairseq does not import on Python 3.11 and later; fairseq-fixed is the same package repaired.
FAIRSEQ = "fairseq-fixed>=0.12.3.1" if sys.version_info >= (3, 11) else "fairseq>=0.12.2"

setup(
    name="fairseq-rkm",
    version=VERSION,
    description="Recurrent kernel machines for the fairseq sequence modelling toolkit and for plain PyTorch",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["fairseq_rkm", "fairseq_rkm.*"]),
    package_data={"fairseq_rkm.ops": ["*.c", "*.cu"]},
    install_requires=["torch>=2.6", "numpy", FAIRSEQ, "sacremoses", "sentencepiece"],
    extras_require={
        "dev": ["hypothesis", "matplotlib", "mypy", "pytest", "ruff", "triton; platform_system == 'Linux'"],
        "plots": ["matplotlib"],
    },
)
