"""Few-shot tasks and small networks to solve them with, the same ones for the same seed."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from implicit_grad.testing._operators import normal


@dataclasses.dataclass(frozen=True)
class Task:
    """A few-shot task: classes as clouds around random centres, to adapt on and to test on."""

    ways: int = 2
    shots: int = 1
    queries: int = 1
    features: int = 2
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels to adapt on, `shots` for each class."""
        return self._examples(self.shots, self.seed + 1)

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels to test on, `queries` for each class."""
        return self._examples(self.queries, self.seed + 1_000_003)

    def _examples(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        centres = normal(self.ways, self.features, seed=self.seed, dtype=self.dtype)
        labels = torch.arange(self.ways).repeat_interleave(number)
        noise = normal(len(labels), self.features, seed=seed, dtype=self.dtype)
        return centres[labels] + noise / 2, labels


@dataclasses.dataclass(frozen=True)
class Network:
    """A small fully connected network; `module` makes it, the same one each time."""

    widths: tuple[int, ...] = (1, 1)
    activation: Literal["tanh", "softplus", "sigmoid"] = "tanh"
    bias: bool = True
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def module(self) -> torch.nn.Sequential:
        """The network; its activation is smooth, and its output linear."""
        activations = {
            "tanh": torch.nn.Tanh,
            "softplus": torch.nn.Softplus,
            "sigmoid": torch.nn.Sigmoid,
        }
        layers: list[torch.nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layer = torch.nn.Linear(inputs, outputs, bias=self.bias, dtype=self.dtype)
            layers += [layer, activations[self.activation]()]
        module = torch.nn.Sequential(*layers[:-1])
        with torch.no_grad():
            for k, parameter in enumerate(module.parameters()):
                numbers = normal(*parameter.shape, seed=self.seed + k, dtype=self.dtype)
                parameter.copy_(numbers / max(parameter.shape[-1], 1) ** 0.5)
        return module
