"""The least that the work can take here: its multiply-accumulates at this machine's own speed of large products.

Computed, not run: a square product in fp32 is timed, in numpy's library and, where it is installed, in torch's, and the
faster of the two counts. Memory, normalisation, softmax and everything else are free in it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

from turn import Parent, versions

SIDE = 2048  # large enough to reach the peak; 17 GFLOP
TRIES = 5  # in each run; the best counts


def best(products: list[Callable[[], object]]) -> float:
    """Seconds of the quickest try of the quickest product."""
    seconds = []
    for _ in range(TRIES):
        for product in products:
            started = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parent = Parent()
    job = parent.job
    import numpy as np

    a, b = np.random.default_rng(0).standard_normal((2, SIDE, SIDE), np.float32)
    out = np.empty_like(a)
    products: list[Callable[[], object]] = [lambda: np.matmul(a, b, out=out)]
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(job["threads"])
        left, right, result = map(torch.from_numpy, (a, b, out))
        products.append(lambda: torch.mm(left, right, out=result))
    for product in products:
        product()
    fastest = []
    for _ in range(job["runs"]):
        fastest.append(best(products))
        parent.tell(run=fastest[-1] * job["macs"] / SIDE**3)
    names = ("numpy", "torch")[: len(products)]
    peak = 2 * SIDE**3 / min(fastest) / 1e9
    parent.tell(
        precision="fp32",
        threads=job["threads"],
        versions=versions(names),
        notes=[
            f"computed: 2 x {job['macs'] / 1e9:.4g} GMAC at the {peak:.4g} GFLOP/s of an fp32 product of side {SIDE}"
        ],
    )


if __name__ == "__main__":
    main()
