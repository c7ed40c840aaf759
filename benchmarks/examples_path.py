"""The examples' modules, for benchmarks that run on the same data or report in the same way."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import characters
import checkpoint
import navigation
import plane
import reporting

__all__ = ["characters", "checkpoint", "navigation", "plane", "reporting"]
