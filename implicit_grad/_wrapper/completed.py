"""What a call returns besides φ, as functions of φ and of the arguments: multipliers."""

from __future__ import annotations

from typing import Any

import torch

from implicit_grad._conditions.base import Call, Condition
from implicit_grad._torch import pytree
from implicit_grad._torch.isolation import Ambient, isolated
from implicit_grad._torch.products import own_precision
from implicit_grad._torch.pytree import Tensors, Tree
from implicit_grad._torch.transforms import Plain, is_transformed, lifted


def completed(condition: Condition, phi: Any, inputs: Tensors, tree: Tree) -> Any:
    """φ and what follows from it, by the condition; differentiable as φ is."""
    tensors, phi_tree = pytree.flatten(phi)
    size, trees = len(tensors), []
    xs = (*tensors, *inputs)

    def more(xs: Tensors, known: Tensors) -> Tensors:
        wanted, devices = torch.is_grad_enabled(), {t.device for t in xs}
        at_phi, a = xs[:size], xs[size:]
        with (
            torch.inference_mode(False),
            isolated(Ambient(devices, at_phi)),
            own_precision(devices),
        ):
            found = condition.more(phi_tree.rebuild(at_phi), Call(*tree.rebuild(a)))
        others, others_tree = pytree.flatten(found)
        trees.append(others_tree)
        return others if wanted else tuple(t.detach() for t in others)

    others = lifted(Plain(more), xs) if is_transformed(xs) else more(xs, ())
    return phi, trees[0].rebuild(others)
