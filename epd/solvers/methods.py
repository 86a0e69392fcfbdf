"""`METHODS`: every solver that needs no training, by the name users type."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .. import parallel
from ..schedule import Floats, of_checkpoint
from ..solve import Solver
from .multistep import deis, dpmpp_2m, dpmpp_3m, ipndm, unipc
from .noisy import euler_ancestral, lcm
from .one_step import dpm2, dpmpp_2s, euler, heun

ALL = ("edm", "sd15", "sd3")  # families; flow=True is for the last


@dataclass(frozen=True)
class Method:
    """One training-free solver: how to build it, and what it costs and promises."""

    name: str  # what users type
    build: Callable[..., Solver]  # build(times, flow=False); where noisy build(times, flow=False, *, noise)
    order: int  # that it shows with the start and the end it really uses; 0: it integrates nothing
    calls: int  # sequential calls per step, at most; 0: depends (parallel in time)
    families: tuple[str, ...]  # of "edm", "sd15", "sd3"
    noisy: bool  # takes `noise`, see `epd.solvers.noisy`
    source: str  # one line: paper
    grid: str = "even"  # kind of `schedule.of_checkpoint`: "own" | "even" (differs in sd3) | "lcm" (differs in sd15)

    def times(self, n: int, family: str, config: Mapping[str, Any]) -> Floats:
        """n + 1 decreasing times: the grid diffusers runs this method on, with a checkpoint's scheduler `config`.

        Family "sd15" or "sd3". Where noisy it ends at 0, as diffusers' do: new noise left at the end would be seen.

        Raises
        ------
        ValueError
            As `schedule.of_checkpoint`.
        """
        grid = of_checkpoint(n, family, config, self.grid)
        if self.noisy:
            grid[-1] = 0.0
        return grid


def _any_family(solver: Callable[[Any], Solver]) -> Callable[..., Solver]:
    """`solver(times)`, the same in every family."""

    def build(times: Any, flow: bool = False) -> Solver:
        return solver(times)

    return build


def _ipndm(order: int) -> Method:
    """Of order 2 on: see `ipndm` for why it shows 2."""

    def build(times: Any, flow: bool = False) -> Solver:
        return ipndm(times, order)

    return Method(f"ipndm_{order}", build, min(order, 2), 1, ALL, False, "iPNDM: Zhang and Chen 2022, arXiv 2204.13902")


def _of_order(solver: Callable[[Any, int, bool], Solver], order: int) -> Callable[..., Solver]:
    def build(times: Any, flow: bool = False) -> Solver:
        return solver(times, order, flow)

    return build


def _parallel(name: str) -> Callable[..., Solver]:
    """`epd.parallel.<name>` over Euler steps, looked up when built: that module is made of these."""

    def build(times: Any, flow: bool = False, **settings: Any) -> Solver:
        solver: Solver = getattr(parallel, name)(times, flow, **settings)
        return solver

    return build


_DPMPP = "Lu et al. 2022, arXiv 2211.01095"
_UNIPC = "Zhao et al. 2023, arXiv 2302.04867"
_DEIS = "Zhang and Chen 2022, arXiv 2204.13902"

_METHODS = (
    Method(
        "euler", _any_family(euler), 1, 1, ALL, False, "Euler, DDIM: Song et al. 2020, arXiv 2010.02502", grid="own"
    ),
    Method("heun", _any_family(heun), 2, 2, ALL, False, "Heun: Karras et al. 2022, arXiv 2206.00364", grid="own"),
    Method("dpm2", _any_family(dpm2), 2, 2, ALL, False, "DPM-Solver-2: Lu et al. 2022, arXiv 2206.00927"),
    Method("dpmpp_2s", dpmpp_2s, 2, 2, ALL, False, f"DPM-Solver++(2S): {_DPMPP}"),
    Method("dpmpp_2m", dpmpp_2m, 2, 1, ALL, False, f"DPM-Solver++(2M): {_DPMPP}"),
    Method("dpmpp_3m", dpmpp_3m, 2, 1, ALL, False, f"DPM-Solver++(3M): {_DPMPP}, as released"),
    Method("unipc_2", _of_order(unipc, 2), 2, 1, ALL, False, f"UniPC-2: {_UNIPC}"),
    Method("unipc_3", _of_order(unipc, 3), 2, 1, ALL, False, f"UniPC-3: {_UNIPC}"),
    Method("deis_2", _of_order(deis, 2), 2, 1, ALL, False, f"DEIS, tAB2 in log rho: {_DEIS}"),
    Method("deis_3", _of_order(deis, 3), 2, 1, ALL, False, f"DEIS, tAB3 in log rho: {_DEIS}"),
    *map(_ipndm, (1, 2, 3, 4)),
    Method(
        "euler_ancestral",
        euler_ancestral,
        1,
        1,
        ALL,
        True,
        "Ancestral sampling: Ho et al. 2020, arXiv 2006.11239",
        grid="own",
    ),
    Method("lcm", lcm, 0, 1, ("sd15", "sd3"), True, "LCM: Luo et al. 2023, arXiv 2310.04378", grid="lcm"),
    Method(
        "paradigms",
        _parallel("paradigms"),
        1,
        0,
        ALL,
        False,
        "ParaDiGMS: Shih et al. 2023, arXiv 2305.16317",
        grid="own",
    ),
    Method(
        "parataa", _parallel("parataa"), 1, 0, ALL, False, "ParaTAA: Tang et al. 2024, arXiv 2402.09970", grid="own"
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _METHODS})
