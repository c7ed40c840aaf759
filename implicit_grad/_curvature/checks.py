"""When products are checked: once for each kind of graph, at every solve, or never."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Literal, get_args

from implicit_grad._options import check_one_of
from implicit_grad._theorem.linearization import Finding
from implicit_grad._torch.graph import (
    Graph,
    edges_of_graph,
    graph_behind,
    unseen_by_saved_tensors_hooks,
)
from implicit_grad._torch.products import own_precision
from implicit_grad._torch.pytree import Tensors

Check = Literal["once", "always", "never"]


def check_option(check: object, where: str) -> None:
    """Raise unless this says when to check."""
    check_one_of(where, "check", check, get_args(Check))


@dataclasses.dataclass(frozen=True)
class Checks:
    """When products are checked, and what came of it for each kind of graph so far."""

    when: Check = "once"
    found: dict[Hashable, Finding | None] = dataclasses.field(default_factory=dict, compare=False)

    def finding(
        self,
        outputs: Tensors,
        phi: Tensors,
        look: Callable[[], Finding | None],
        order: int = 2,
        graph: Graph | None = None,
    ) -> Finding | None:
        """What `look` finds, or found the last time that a graph was of this kind.

        `graph` is that behind the outputs, if somebody has walked there before.
        """
        if self.when == "never":
            return None
        edges = edges_of_graph(graph_behind(outputs) if graph is None else graph, phi)
        return self.of_kind((order, edges, tuple(p.dtype for p in phi)), look, phi)

    def of_kind(
        self, kind: Hashable, look: Callable[[], Finding | None], phi: Tensors
    ) -> Finding | None:
        """What `look` finds for the kind, or found the last time; without autocast, as backward."""
        if self.asks(kind):
            with unseen_by_saved_tensors_hooks(), own_precision(p.device for p in phi):
                self.found[kind] = look()
        return self.found.get(kind)

    def asks(self, kind: Hashable) -> bool:
        """Whether a check of that kind would be made now."""
        return self.when == "always" or (self.when == "once" and kind not in self.found)
