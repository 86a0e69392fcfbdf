"""Training of solver tables, with torch: stage 1, distillation from converged trajectories (`python -m epd.train`).

What it learns is a `Table`; what it learns through is the coroutine `epd.solvers.epd` itself, on tensors.
"""
