"""What φ solves, F(φ, a) = 0: a minimum, a minimum near θ, a root, a fixed point.

A condition evaluates the user's function at φ and says how F and A follow from it; it may import
from `_curvature` and from what that may import, and knows nothing of the solver that found φ.
"""
