"""What solvers, devices and models are worth, measured: python -m benchmarks quality MODEL."""
