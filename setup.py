"""Build and dependencies; the tools' settings are in pyproject.toml."""

import re
from itertools import chain
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "implicit_grad" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1)

NEIGHBOURS = {
    # On Python >= 3.10 learn2learn's C files must be built anew; to install this extra, add
    # --config-settings="--build-option=build_ext". Its qpth wants numpy < 2, which has no wheels
    # for 3.13; without the two bounds pip tries older qpths, whose metadata is broken.
    "learn2learn": [
        "learn2learn>=0.2,<0.3",
        "torchvision>=0.19,<1",
        "qpth>=0.0.18,<1",
        "numpy<2",
    ],
    "torchopt": ["torchopt>=0.7.3,<1"],
    "scipy": ["scipy>=1.11,<2"],
    "gurobi": ["gurobipy>=11,<14"],
    "plot": ["matplotlib>=3.8,<4"],
}
TOOLS = [
    "hypothesis>=6.100,<7",
    "mypy>=2.4,<2.5",  # new versions of these two find new faults: raise them on purpose
    "ruff>=0.17,<0.18",
    "pytest>=8,<10",
    "pytest-cov>=6,<8",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",
    "rich>=13,<16",
    "scikit-learn>=1.4,<2",
    "tqdm>=4.66,<5",
]

setup(
    name="implicit-grad",
    version=VERSION,
    description="Wrap any solver; its backward pass is a linear solve.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The implicit_grad authors",
    license="Apache-2.0",
    packages=find_packages(include=["implicit_grad", "implicit_grad.*"]),
    package_data={"implicit_grad": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.4,<3", "optree>=0.13,<1", "numpy>=1.26,<3"],
    extras_require={**NEIGHBOURS, "dev": [*chain(*NEIGHBOURS.values()), *TOOLS]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
