"""The reports of backward solves, under the name by which they are imported."""

from implicit_grad._theorem.report import Monitor, Report

__all__ = ["Monitor", "Report"]
