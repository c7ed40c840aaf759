"""M x = b, with M known by its products, and nothing else: no φ, no F, no autograd.

A linear solver takes a flat operator and a flat vector. This folder may import `_options` and
`_errors` only; of the rest it knows no more than the words of a few messages.
"""
