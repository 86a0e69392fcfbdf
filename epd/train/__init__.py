"""Training of tables, with torch: distillation (stage 1) and residual Dirichlet policy optimisation (stage 2)."""
