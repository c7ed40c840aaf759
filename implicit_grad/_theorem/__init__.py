"""The implicit function theorem: Aᵀu = v, da = −(∂F/∂a)ᵀu. Start with `implicit_function`.

What F is and how systems are solved is handed in, so this folder knows no condition and no solver;
it may import from `_linear_solvers` (their contract), `_torch`, `_options` and `_errors`.
"""
