"""The examples' modules, for benchmarks that run on the same data."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import characters

__all__ = ["characters"]
