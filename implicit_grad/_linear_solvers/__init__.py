"""M x = b, with M known by its products, and nothing else: no φ, no F, no autograd.

A linear solver takes a flat operator and a flat vector; this folder may import `_options` and
`_errors` only, and would work in any other library.
"""
