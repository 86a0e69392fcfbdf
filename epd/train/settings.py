"""How a policy is trained: the numbers, checked. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import RequestError


@dataclass(frozen=True)
class Settings:
    """How a policy is trained. The same settings on the same model give the same table."""

    iterations: int = 40
    batch: int = 16  # prompts of an iteration, each with noise of its own
    group: int = 8  # G: tables for each prompt
    concentration: float = 200.0  # kappa, at the start
    scales: float = 0.0  # standard deviation of the logarithms of the scales; 0: not learned
    alike: float = 0.0  # dB that every number, moved alone, leaves pictures alike to; 0: as the two above say for all
    rate: float = 1e-2  # of AdamW, to begin with
    step: float = 0.05  # KL that the policy moves by in an iteration, a mean over intervals: the rate is adapted to it
    epochs: int = 4  # steps of the optimiser an iteration
    clip: float = 0.2  # of the ratio
    kl: float = 0.0  # weight of the divergence from the first policy
    every: int = 5  # iterations from one validation to the next
    validation: int = 32  # prompts set aside to choose by
    export: str = "mean"  # mean | mode of the policy
    seed: int = 0

    def check(self) -> None:
        """Raises RequestError for the first thing that cannot be."""
        for name, least in (
            ("iterations", 1),
            ("batch", 1),
            ("group", 2),
            ("epochs", 1),
            ("every", 1),
            ("validation", 2),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise RequestError(f"--{name} must be {least} or more, got {getattr(self, name)}")
        for name in ("concentration", "rate", "step", "clip"):
            if not 0 < getattr(self, name) < 1e9:
                raise RequestError(f"--{name} must be above 0, got {getattr(self, name)}")
        for name in ("scales", "kl"):
            if not 0 <= getattr(self, name) < 1e9:
                raise RequestError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        self._check_alike()
        if self.iterations % self.every:
            raise RequestError(f"--iterations must be a multiple of --every {self.every}, got {self.iterations}")
        if self.export not in ("mean", "mode"):
            raise RequestError(f"--export must be mean or mode, got {self.export!r}")

    def _check_alike(self) -> None:
        if self.alike and not 20 <= self.alike <= 75:
            raise RequestError(f"--alike must be 20 to 75 (dB), got {self.alike:g}")
        if self.alike and (self.scales or self.concentration != Settings.concentration):
            raise RequestError("--alike takes the place of --scales and --concentration; leave them out")
