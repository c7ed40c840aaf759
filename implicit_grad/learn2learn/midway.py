"""The middle of a learner's steps, around which their own derivative is taken.

MAML's dφ/dθ is the product of (I − lr·Hₖ) over its n steps, Hₖ the Hessian that each one met.
Where these change evenly, that is nearly (I − lr·H)ⁿ for the H of the step in the middle: the
midpoint rule, for the sum of their logarithms. So one graph is kept of n, and `EarlyStopped` takes
the power.
"""

from __future__ import annotations

import dataclasses


def middle_of(steps: int) -> int:
    """How many of so many steps come before the one in the middle."""
    return (steps - 1) // 2


@dataclasses.dataclass
class Midway:
    """How many steps the learners of a family take, seen from the last one that was differentiated.

    A learner that is given losses one by one cannot know which of them is in its middle. The first
    one, and those that take other numbers of steps, are linearised around their last loss.
    """

    steps: int = 0

    def is_middle(self, number: int) -> bool:
        """Whether this step, counted from 1, is the one whose graph is to be kept."""
        return number == middle_of(self.steps) + 1

    def is_last(self, number: int) -> bool:
        """Whether no step comes after this one."""
        return number == self.steps
