"""Training of tables, with torch: distillation (stage 1) and residual Dirichlet policy optimisation (stage 2).

What is learned is a `Table`; what it is learned through is the coroutine `epd.solvers.epd` itself.
"""
