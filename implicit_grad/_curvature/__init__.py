"""What A is made of: an objective's Hessian, its Gauss-Newton part, or differences of gradients.

Each is a `Linearization` of ∇objective; this folder may import from `_theorem`, and from
what that may import.
"""
