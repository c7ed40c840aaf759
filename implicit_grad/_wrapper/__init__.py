"""One call of a wrapped solver: it runs, its φ is checked, F is recorded there, gradients attached.

Here solver, condition and theorem meet; this folder may import `_conditions`, and what that may
import, but not `solvers`.
"""
