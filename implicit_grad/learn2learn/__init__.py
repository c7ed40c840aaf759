"""`imaml`: a MAML pipeline with implicit gradients, by wrapping one object.

Adaptation is a solver and the adapted weights are its φ; this folder may import from
`_wrapper`, `solvers` and what these may import. learn2learn's MAML is recognised by its attributes,
and learn2learn itself is never imported.
"""

from implicit_grad.learn2learn.maml import ImplicitMAML, imaml

__all__ = ["ImplicitMAML", "imaml"]
