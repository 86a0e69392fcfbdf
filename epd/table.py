"""`Table`: the numbers of one learned solver, with the time grid and the model they belong to. JSON, validated.

Knows nothing of networks; `epd.solvers.epd` turns a table into a solver.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .schedule import Floats, decreasing

FORMAT = "epd-table"
VERSION = 1
CHOICES = {
    "start": ("call", "afs", "history"),
    "midpoint": ("geometric", "arithmetic"),
    "weights": ("simplex", "free"),
}


def point_times(midpoint: str, t: Any, t_next: Any, r: Any) -> Any:
    """Times at position r between t (r = 0) and t_next (r = 1): t_next^r t^(1-r), or t + r (t_next - t)."""
    return t_next**r * t ** (1 - r) if midpoint == "geometric" else t + r * (t_next - t)


@dataclass(frozen=True, eq=False)
class Table:
    """One learned solver: N intervals, K directions each. Arrays are float64, read-only; ValueError on a broken rule.

    An interval t -> t_next asks for K points at once and takes the weighted sum of their slopes:

        t_k  = t_next^r t^(1-r) (geometric) or t + r (t_next - t) (arithmetic)
        x_k  = x + (t_k - t) * direction_k
        x   += (t_next - t) * (sum_k w_k scale_dir_k scale_time_k slope(x_k, scale_time_k t_k) + sum_j carry_j past_j)

    start "call": every direction is the slope d at (x, t), a call of its own (with order > 1: the Adams-Bashforth
    combination of d and earlier start slopes). start "afs": the same, but x / sqrt(1 + t^2) on the first interval.

    start "history": direction_k = sum_j place[i, k, j] past_j. `past` is [slope(x, t_0)], one real call, at interval 0;
    after each interval its K new slopes, in row order k = 0 .. K-1 and unscaled, are put in front of it. So at
    interval i past has 1 + K i entries: entry j < K i is point j % K of interval i - 1 - j // K, entry K i is the first
    call's. Both `place` and `carry` of interval i read `past` as it was before that interval's own slopes. Columns of
    `place` and `carry` without such an entry, or that meet a point never asked for (weight 0), must be 0.

    A zero weight is a point that is not asked for; every interval asks for at least one.
    """

    times: Floats  # (N+1,) sigma, strictly decreasing; > 0, the last may be 0 for arithmetic points
    r: Floats  # (N, K) position of each point: in (0, 1) geometric, in (0, 1] arithmetic; 0 is the noisy end
    w: Floats  # (N, K) weights: rows on the simplex (to 1e-6), or free
    scale_dir: Floats = None  # type: ignore[assignment]  # (N, K) > 0, factor of each slope; None: ones
    scale_time: Floats = None  # type: ignore[assignment]  # (N, K) > 0, factor of the time asked at; None: ones
    start: str = "call"  # call | afs (first step analytic) | history
    order: int = 1  # 1 is EPD; 2..4 the plugin on iPNDM: start slopes used for placing
    midpoint: str = "geometric"  # geometric (published tables) | arithmetic
    weights: str = "simplex"  # simplex | free
    place: Floats | None = None  # (N, K, J), start "history" only and required there
    carry: Floats | None = None  # (N, Q), start "history" only; None: nothing carried
    family: str | None = None  # what it belongs to, for information and for the caller to check
    model: str | None = None
    grid: str | None = None  # how `times` were made, for a reader
    guidance: float | None = None  # guidance scale it was made for
    size: tuple[int, int] | None = None  # height, width in pixels it was made for
    t5: bool | None = None  # made with real T5 text tokens (SD3); None: not known, or the model has none
    provenance: Mapping[str, Any] | None = None  # JSON object: who made it, how, from what

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _rule(getattr(self, name) in choices, f"{name} must be one of {', '.join(choices)}")
        _rule(type(self.order) is int and 1 <= self.order <= 4, "order must be an integer from 1 to 4")
        self._set("times", decreasing(_numbers("times", self.times)))
        self._set("r", _numbers("r", self.r))
        n = self.steps
        _rule(self.r.ndim == 2 and len(self.r) == n and self.r.size > 0, f"r must have shape (N, K) with N = {n}")
        for name in ("w", "scale_dir", "scale_time"):
            value = getattr(self, name)
            scaled = name != "w" and value is None
            self._set(name, np.ones_like(self.r) if scaled else _numbers(name, value, self.r.shape))
        self._check_numbers()
        self._check_history()
        self._check_metadata()

    @property
    def steps(self) -> int:
        """N, the number of intervals."""
        return len(self.times) - 1

    @property
    def directions(self) -> int:
        """K, the number of points per interval."""
        return int(self.r.shape[1])

    @property
    def sequential_calls(self) -> int:
        """Requests in turn: 2N; one less with afs; N + 1 from history."""
        return self.steps + self._starts

    @property
    def total_evaluations(self) -> int:
        """Network evaluations per image (guidance not counted): points of non-zero weight, and start calls."""
        return int(np.count_nonzero(self.w)) + self._starts

    @property
    def held_out_psnr(self) -> float | None:
        """dB by which pictures of held-out prompts agree with converged ones; None: not measured.

        As its `quality` tells, which is of the same pictures for all tables of a model; else as those found that
        it was judged by when it was made.
        """
        return self._told("held_out", "psnr_db") if self.quality_psnr is None else self.quality_psnr

    @property
    def quality_psnr(self) -> float | None:
        """The former of these two."""
        return self._told("quality", "psnr_db")

    @property
    def as_good_as_own_solver(self) -> bool:
        """Whether its `quality` found it no less close than the model's own solver in its own steps."""
        ours, own = self.quality_psnr, self._told("quality", "own_solver_db")
        return ours is not None and own is not None and ours >= own

    def _told(self, section: str, name: str) -> float | None:
        """A number in a section of the provenance."""
        found = (self.provenance or {}).get(section)
        value = found.get(name) if isinstance(found, Mapping) else None
        return float(value) if _real(value) else None

    @property
    def _starts(self) -> int:
        return {"call": self.steps, "afs": self.steps - 1, "history": 1}[self.start]

    def to_json(self) -> dict[str, Any]:
        """The table as a JSON object; fields that are None are left out. Floats survive exactly."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        numbers = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items() if v is not None}
        return {"format": FORMAT, "version": VERSION, **numbers}

    @classmethod
    def from_json(cls, data: Any, source: str = "table") -> "Table":
        """The table of a JSON object; ValueError, prefixed with `source`, if it is none or breaks a rule."""
        names = {field.name for field in fields(cls)}
        try:
            _rule(isinstance(data, dict) and data.get("format") == FORMAT, f'not a table (no "format": "{FORMAT}")')
            version = data.get("version")
            _rule(version == VERSION, f"unknown table version {version!r}; this program reads version {VERSION}")
            unknown = sorted(data.keys() - names - {"format", "version"})
            _rule(not unknown, f"unknown keys: {', '.join(unknown)}")
            missing = sorted({"times", "r", "w"} - data.keys())
            _rule(not missing, f"missing keys: {', '.join(missing)}")
            return cls(**{name: value for name, value in data.items() if name in names})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Table":
        """Read a table file; ValueError names the file and the broken rule, OSError if it cannot be read."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, an endless integer; nested without end
            raise ValueError(f"{path}: not a table, no valid JSON ({error})") from error
        return cls.from_json(data, str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a table file, so that no reader ever sees half of it; OSError names it if it cannot be written."""
        write_whole(Path(path), (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())

    def _set(self, name: str, value: NDArray[np.float64]) -> None:
        value.setflags(write=False)
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        asked = self.w != 0
        if self.midpoint == "geometric":
            _rule(self.times[-1] > 0, "times must be > 0: a geometric midpoint cannot reach 0 (arithmetic ones can)")
            _rule(bool(((self.r > 0) & (self.r < 1)).all()), "r must be in (0, 1)")
        else:
            _rule(bool(((self.r > 0) & (self.r <= 1)).all()), "r must be in (0, 1]")
            reach = point_times(self.midpoint, self.times[:-1, None], self.times[1:, None], self.r)
            _rule(bool((reach[asked] > 0).all()), "r must be < 1 in an interval that ends at 0: no slope is asked at 0")
        if self.weights == "simplex":
            _rule(bool((self.w >= 0).all()), "w must be >= 0 (weights = simplex)")
            _rule(bool((abs(self.w.sum(1) - 1) <= 1e-6).all()), "w must sum to 1 in every row (weights = simplex)")
        _rule(bool(asked.any(1).all()), "w must ask for at least one point in every row")
        for name in ("scale_dir", "scale_time"):
            _rule(bool((getattr(self, name) > 0).all()), f"{name} must be > 0")

    def _check_history(self) -> None:
        if self.start != "history":
            _rule(self.place is None and self.carry is None, 'place and carry need start = "history"')
            return
        _rule(self.order == 1, 'order must be 1 with start = "history": place says how points are placed')
        _rule(self.place is not None, 'place is required with start = "history"')
        n, k = self.r.shape
        known = [True]  # which entries of past exist, newest first
        for name, axes in (("place", 3), ("carry", 2)):
            if getattr(self, name) is None:
                continue
            self._set(name, _numbers(name, getattr(self, name)))
            shape = getattr(self, name).shape
            expected = (n, k, "J") if axes == 3 else (n, "Q")
            fits = len(shape) == axes and shape[:-1] == expected[:-1] and shape[-1] > 0
            _rule(fits, f"{name} must have shape {expected}, got {shape}".replace("'", ""))
        for i in range(n):
            for name in ("place", "carry"):
                value = getattr(self, name)
                if value is not None:
                    used = value[i][self.w[i] != 0] if name == "place" else value[i : i + 1]
                    columns = np.flatnonzero(used.any(0)).tolist()
                    wrong = [j for j in columns if j >= len(known) or not known[j]]
                    _rule(not wrong, f"{name} of interval {i} must be 0 in column {wrong}: no such slope is known")
            known = [*(self.w[i] != 0).tolist(), *known]

    def _check_metadata(self) -> None:
        for name in ("family", "model", "grid"):
            _rule(isinstance(getattr(self, name), str | None), f"{name} must be a string")
        if self.guidance is not None:
            _rule(_real(self.guidance) and self.guidance >= 0, "guidance must be a finite number >= 0")
        _rule(isinstance(self.t5, bool | None), "t5 must be true or false")
        if self.size is not None:
            pair = isinstance(self.size, tuple | list) and len(self.size) == 2
            _rule(pair and all(type(s) is int and s > 0 for s in self.size), "size must be two positive integers")
            object.__setattr__(self, "size", tuple(self.size))
        if self.provenance is not None:
            _rule(isinstance(self.provenance, Mapping), "provenance must be a JSON object")
            try:
                kept = json.loads(json.dumps(dict(self.provenance), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"provenance must be a JSON object ({error})") from error
            object.__setattr__(self, "provenance", kept)


def start_table(times: Any, k: int) -> Table:
    """The table to begin with when none is trained: K points at r = j / (K + 1), j = 1 .. K, of equal weight 1 / K.

    Geometric points if `times` end above 0, arithmetic ones if they end at 0; start by a call. Order 2 (midpoint
    condition), but on a grid whose last interval spans a large ratio of times it is poor until trained.
    """
    if k < 1:
        raise ValueError(f"a table needs at least one direction, got {k}")
    grid = decreasing(times)
    shape = (len(grid) - 1, k)
    r = np.broadcast_to(np.arange(1, k + 1) / (k + 1), shape)
    midpoint = "geometric" if grid[-1] > 0 else "arithmetic"
    return Table(times=grid, r=r, w=np.full(shape, 1 / k), midpoint=midpoint, provenance={"made by": "start_table"})


def write_whole(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside `path`, then renames; OSError, with `path` as its file, leaves nothing."""
    temporary = path.with_name(f".{os.getpid()}.tmp")  # short: the path's own name may be as long as a name can be
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):  # such as that its folder is none, which has been told
            temporary.unlink(missing_ok=True)


def _real(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that a float holds, which NaN and 10**400 are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _rule(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _numbers(name: str, value: Any, shape: tuple[int, ...] | None = None) -> Floats:
    """A fresh float64 array of finite numbers, of the given shape."""
    try:
        array = np.array(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array with rows of one length") from error
    _rule(array.dtype.kind in "fiu", f"{name} must be numbers")
    _rule(shape is None or array.shape == shape, f"{name} must have shape {shape}, got {array.shape}")
    _rule(bool(np.isfinite(array).all()), f"{name} must be finite")
    return array.astype(np.float64)
