"""What is to be fitted, and the images it takes: prompts and seeds in groups, each with one role of three.

Knows nothing of networks or tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bundle import PROMPTS
from .errors import RequestError
from .plan import MOST_DIRECTIONS


@dataclass(frozen=True)
class Order:
    """What is to be fitted. The same order on the same bundle gives the same table."""

    prompts: tuple[str, ...]  # at least 4: half to learn from, a quarter to choose by, a quarter to judge by
    calls: int = 6  # sequential calls of the table: N + 1
    directions: int = 2  # K
    guidance: tuple[float, ...] = ()  # scales; more than one: a table for all of them; none: the bundle's own
    trajectories: int = 16  # to learn from; half as many each to choose and to judge by
    teacher_calls: int = 120  # of a converged trajectory
    candidates: int = 24  # designs tried, at most
    seed: int = 100_000  # of the first start noise

    def check(self) -> None:
        """Raises RequestError for the first thing that cannot be."""
        for name, value, least, most in (
            ("--calls", self.calls, 2, 100),
            ("-k", self.directions, 1, MOST_DIRECTIONS),
            ("--trajectories", self.trajectories, 2, 10_000),
            ("--candidates", self.candidates, 1, 10_000),
            ("--teacher-calls", self.teacher_calls, 1, 10_000),
        ):
            if not least <= value <= most:
                raise RequestError(f"{name} must be from {least} to {most}, got {value}")
        for holds, text in (
            (
                self.teacher_calls >= 8 * self.calls,
                f"--teacher-calls must be 8 times --calls or more, got {self.teacher_calls}; give {8 * self.calls}",
            ),
            (len(self.prompts) >= 4, f"fitting needs 4 prompts or more, one a line, got {len(self.prompts)}"),
            (all(abs(scale) <= 1000 for scale in self.guidance), "guidance scales must be from -1000 to 1000"),
            (self.seed >= 0, f"--seed must be 0 or more, got {self.seed}"),
            (
                self.trajectories // 2 >= len(self.guidance),
                f"{len(self.guidance)} guidance scales need --trajectories {2 * len(self.guidance)} or more",
            ),
        ):
            if not holds:
                raise RequestError(text)


@dataclass(frozen=True)
class Group:
    """Images that go through the network together: one guidance scale, a prompt and a seed each."""

    role: str  # learn | choose | judge
    guidance: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the network that one point of every image takes."""
        return len(self.seeds) * (2 if self.guidance > 1 else 1)


def read_prompts(file: Path | None, bundle_folder: Path) -> tuple[str, ...]:
    """Prompts, one a line, each once: of a file, else of the bundle, else those that come with this package.

    Raises
    ------
    RequestError
        The file cannot be read as UTF-8 text.
    """
    own = bundle_folder / PROMPTS
    chosen = file or (own if own.is_file() else Path(__file__).with_name(PROMPTS))
    try:
        lines = chosen.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise RequestError(f"{chosen}: {error.strerror}; give a text file with a prompt a line") from None
    except UnicodeDecodeError:
        raise RequestError(f"{chosen}: not UTF-8 text; give a text file with a prompt a line") from None
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def groups(order: Order, scales: tuple[float, ...], size: int) -> list[Group]:
    """All images in groups of one role and guidance scale; no prompt and no seed has two roles."""
    half, quarter = len(order.prompts) // 2, len(order.prompts) // 4
    prompts = {
        "learn": order.prompts[:half],
        "choose": order.prompts[half : half + quarter],
        "judge": order.prompts[half + quarter :],
    }
    few = max(2, order.trajectories // 2)
    found, seed = [], order.seed
    for role, count in (("learn", order.trajectories), ("choose", few), ("judge", few)):
        for place, scale in enumerate(scales):
            mine = list(range(place, count, len(scales)))  # scales take turns
            for start in range(0, len(mine), size):
                part = mine[start : start + size]
                own = prompts[role]
                found.append(Group(role, scale, tuple(own[i % len(own)] for i in part), tuple(seed + i for i in part)))
        seed += count
    return found
