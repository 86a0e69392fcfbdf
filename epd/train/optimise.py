"""Residual Dirichlet policy optimisation (RDPO) of a table against any score of it, from forward passes alone.

An iteration draws G tables from the policy (`epd.train.policy`) for each of a few prompts, lets all of them draw the
prompt's picture from the same start noise, and moves the policy towards the tables whose pictures are worth more.

Differences from the published recipe (arXiv 2512.22796 and its released code):
- advantages are taken within one prompt **and** one noise; there, groups mix prompts and noises, and what a prompt or
  a noise is worth hides what the table is; and in units of the group's own spread where it is wide, so that a few
  pictures that change much do not drown all others;
- every prompt has G tables of its own, so that an iteration tries prompts x G tables, not G;
- numbers may be drawn as widely as each, moved alone, leaves pictures alike (`epd.train.reach`);
- a higher concentration: theirs (10 to 20) tries positions some 0.1 from the table's, where pictures are much worse;
- the table that is kept is the one best on validation prompts and noises that nothing is learned from, the given table
  among them; test prompts are never seen;
- the ratio is clipped for each interval, not for the whole table;
- the learning rate is adapted, so that the policy moves as far in an iteration as is asked (in KL): how far a rate
  takes it depends on the table, and a step much wider than the policy forgets what was learned.

The policy, the optimiser and the best table are kept in a folder after every iteration: the same command goes on from
there, and ends where an unbroken run would. Knows nothing of models or pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import epd
from epd.table import write_whole
from runtime.errors import RequestError
from runtime.interval import interval

from .checkpoint import restore, state_of, under
from .policy import Distribution, Draw, Policy
from .ppo import advantages, surrogate
from .reach import Reach
from .rollout import Rollout
from .settings import Settings

Array = NDArray[np.float64]
Score = Callable[[Sequence[Rollout]], Iterable[Array]]  # every rollout's rewards, (G, parts) each, in order
Told = Callable[[str], None]  # one line of news

VALIDATION_SEED = 7_000_000  # of the first validation picture's noise
TRAINING_SEED = 20_000_000  # of the first training picture's
REACHED = 4  # prompts that reaches are measured on
HALVINGS = 20  # of the way that a step is cut back to
ADAPTED = 1.5  # times the learning rate at most, from one iteration to the next
LOG, CHECKPOINT = "log.jsonl", "checkpoint.safetensors"  # in the work folder
_FORMAT = 2  # of a checkpoint: another one is of a training that would end elsewhere
PARAMETERS = ("r", "w", "scale_dir", "scale_time")  # of a table, what a policy changes


class Training:
    """One policy over one table; `run` trains it, or goes on where it was stopped.

    Parameters
    ----------
    prompts : sequence of str
        At least 4, each once; `settings.validation` of them, at most a quarter (but 2), are set aside to choose by.
    score : callable
        Carries out rollouts.
    names, weights : sequences
        Of the parts of the reward.
    work : Path
        Folder of checkpoint.safetensors and log.jsonl.
    origin : str
        What else the result depends on, as text: model, provider, guidance.
    reach : callable, optional
        Told a few prompts, measures how widely tables are drawn; None: as the settings say.
    """

    def __init__(
        self,
        table: epd.Table,
        prompts: Sequence[str],
        score: Score,
        names: Sequence[str],
        weights: Sequence[float],
        settings: Settings,
        work: Path,
        origin: str = "",
        reach: Callable[[Sequence[str]], Reach] | None = None,
    ) -> None:
        settings.check()
        if len(prompts) < 4:
            raise RequestError(f"training needs 4 prompts or more, one a line, got {len(prompts)}")
        self.table, self.settings, self.measure = table, settings, reach
        even = Reach(settings.concentration, settings.concentration, settings.scales)
        try:
            self._begin(Reach(1.0, 1.0, 1.0) if reach else even)
        except ValueError as error:
            raise RequestError(str(error)) from None
        self.first = replace(table, w=self.policy.given[1].mean.numpy())
        self.score, self.names, self.weights = score, tuple(names), np.array(weights, np.float64)
        self.work = work
        order = np.random.default_rng([settings.seed, 0]).permutation(len(prompts))
        aside = max(2, min(settings.validation, len(prompts) // 4))
        self.validation, self.prompts = ([prompts[i] for i in part] for part in np.split(order, [aside]))
        told = [_FORMAT, table.to_json(), list(prompts), asdict(settings) | {"iterations": 0}]
        told += [names, list(weights), origin]
        self.fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self.iteration = 0  # of those done
        self.best, self.best_iteration = self.first, 0
        self.start_rewards = self.best_rewards = np.empty((0, len(self.names)))  # on validation, (V, parts)

    def _begin(self, reach: Reach) -> None:
        """A policy that draws so widely, and has learned nothing yet."""
        self.reach = reach
        self.policy = Policy(self.table, reach, self.settings.seed)
        self.reference = _frozen(self.policy)
        self.optimiser = torch.optim.AdamW(self.policy.parameters(), lr=self.settings.rate, weight_decay=0.0)

    def run(self, told: Told = lambda line: None) -> epd.Table:
        """The best table on validation; the given one where none was better.

        Raises
        ------
        RequestError
            The work folder holds another training; or a reward cannot be used. What was done is kept.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        if self.resume():
            told(f"going on after iteration {self.iteration} of {self.settings.iterations}, from {self.work}")
        else:
            if self.measure is not None:
                told(f"measuring how far each number may be moved, on {len(self.prompts[:REACHED])} prompts")
                self._begin(self.measure(self.prompts[:REACHED]))
            self.start_rewards = self.best_rewards = self._validated(self.first)
            (self.work / LOG).unlink(missing_ok=True)
            self._keep({"iteration": 0, "validation": self._judged(self.start_rewards)})
        while self.iteration < self.settings.iterations:
            line = self._iterate()
            told(_in_words(line))
        return self._signed()

    @property
    def gain(self) -> Array:
        """What the best table's rewards on validation are above the given one's, paired and weighted: (V,)."""
        return np.asarray((self.best_rewards - self.start_rewards) @ self.weights)

    def _iterate(self) -> dict[str, Any]:
        began, settings, number = time.perf_counter(), self.settings, self.iteration
        rng = np.random.default_rng([settings.seed, 1, number])
        chosen = rng.choice(len(self.prompts), settings.batch, replace=settings.batch > len(self.prompts))
        distribution = self.policy()
        draw = distribution.draw(settings.batch * settings.group, rng)
        tables = self.policy.tables(draw)
        rollouts = [
            Rollout(
                self.prompts[prompt],
                TRAINING_SEED + number * settings.batch + i,
                tuple(tables[i * settings.group : (i + 1) * settings.group]),
            )
            for i, prompt in enumerate(chosen)
        ]
        parts = np.stack(list(self.score(rollouts)))  # (P, G, parts)
        rewards = parts @ self.weights
        advantage = torch.from_numpy(advantages(rewards).ravel())
        old = distribution.log_prob(draw).detach()
        line = {
            "iteration": number + 1,
            "reward": float(rewards.mean()),
            "rewards": dict(zip(self.names, parts.mean((0, 1)).tolist(), strict=True)),
            "spread": float(rewards.std(1).mean()),  # of the rewards of a group
        }
        line |= self._improve(draw, old, advantage)
        self.iteration += 1
        if self.iteration % settings.every == 0:
            line["validation"] = self._validate()
        line["seconds"] = round(time.perf_counter() - began, 2)
        self._keep(line)
        return line

    def _improve(self, draw: Draw, old: Tensor, advantage: Tensor) -> dict[str, float]:
        """Steps of the optimiser on what was drawn, until the policy has moved as far as it may."""
        settings, before, went = self.settings, _frozen(self.policy), 0.0
        start = [value.detach().clone() for value in self.policy.parameters()]

        def moved() -> float:
            return float(_frozen(self.policy).kl(before).mean())

        clipped = torch.zeros(())
        for _ in range(settings.epochs if advantage.any() or settings.kl else 0):  # else only momentum would move it
            distribution = self.policy()
            gained, clipped = surrogate(distribution.log_prob(draw), old, advantage, settings.clip)
            divergence = distribution.kl(self.reference).mean()
            self.optimiser.zero_grad(set_to_none=True)
            (settings.kl * divergence - gained).backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimiser.step()
            went = moved()
            if not went <= settings.step:  # nor where it is not a number
                self._go_back(start, moved)
                break
        line: dict[str, float] = {"moved": moved(), "rate": self.rate, "clipped": float(clipped)}
        line["kl"] = float(_frozen(self.policy).kl(self.reference).mean())
        if advantage.any():  # else there was no way to go
            wanted = math.sqrt(settings.step / max(went, 1e-300)) if math.isfinite(went) else 0.0
            self.rate *= min(max(wanted, 1 / ADAPTED), ADAPTED)
        return line

    def _go_back(self, start: Sequence[Tensor], moved: Callable[[], float]) -> None:
        """The policy where, on the way from its parameters at the start to those now, it has moved as far as it may."""
        end = [value.detach().clone() for value in self.policy.parameters()]

        def go(share: float) -> None:
            with torch.no_grad():
                for value, first, last in zip(self.policy.parameters(), start, end, strict=True):
                    value.copy_(first + share * (last - first) if share else first)

        near, far = 0.0, 1.0
        for _ in range(HALVINGS):
            go((near + far) / 2)
            if moved() <= self.settings.step:
                near = (near + far) / 2
            else:
                far = (near + far) / 2
        go(near)

    @property
    def rate(self) -> float:
        """Of the optimiser, now."""
        return float(self.optimiser.param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        self.optimiser.param_groups[0]["lr"] = value

    def _validate(self) -> dict[str, Any]:
        """The policy's table on the validation prompts; it is kept if it is the best so far."""
        distribution = self.policy()
        try:
            draw = distribution.mean() if self.settings.export == "mean" else distribution.mode()
        except ValueError as error:
            raise RequestError(f"iteration {self.iteration}: {error}") from None
        (table,) = self.policy.tables(draw)
        found = self._validated(table)
        if (found @ self.weights).mean() > (self.best_rewards @ self.weights).mean():
            self.best, self.best_rewards, self.best_iteration = table, found, self.iteration
        return self._judged(found)

    def _validated(self, table: epd.Table) -> Array:
        """Rewards of a table on the validation prompts, (V, parts)."""
        rollouts = [Rollout(prompt, VALIDATION_SEED + i, (table,)) for i, prompt in enumerate(self.validation)]
        return np.concatenate(list(self.score(rollouts)))

    def _judged(self, found: Array) -> dict[str, Any]:
        gain = (found - self.start_rewards) @ self.weights
        return {
            "reward": float((found @ self.weights).mean()),
            "rewards": dict(zip(self.names, found.mean(0).tolist(), strict=True)),
            "over start": float(gain.mean()),
            "half width": interval(gain).half,  # of the 95 % interval of that paired difference
        }

    def _keep(self, line: dict[str, Any]) -> None:
        """The state after an iteration, then its line in the log."""
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors |= state_of(self.optimiser, "optimiser")
        tensors |= {f"best.{name}": torch.tensor(getattr(self.best, name)) for name in PARAMETERS}
        tensors |= {"rewards.start": torch.tensor(self.start_rewards), "rewards.best": torch.tensor(self.best_rewards)}
        tensors |= {f"reach.{name}": torch.as_tensor(value) for name, value in self.reach._asdict().items()}
        facts: dict[str, Any] = {"iteration": self.iteration, "best": self.best_iteration, "rate": self.rate}
        facts |= {"fingerprint": self.fingerprint}
        kept = {name: value.contiguous() for name, value in tensors.items()}
        earlier = [one for one in read_log(self.work) if one["iteration"] < line["iteration"]]
        text = "".join(f"{json.dumps(one)}\n" for one in [*earlier, line])
        write_whole(self.work / LOG, text.encode())
        write_whole(self.work / CHECKPOINT, save(kept, {"training": json.dumps(facts)}))

    def resume(self) -> bool:
        """Takes up the state that the work folder holds; False where it holds none.

        Raises
        ------
        RequestError
            It is another training's, or one of more iterations.
        """
        file = self.work / CHECKPOINT
        if not file.is_file():
            return False
        try:
            with safe_open(file, "pt") as opened:
                facts = json.loads((opened.metadata() or {}).get("training", "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
        except SafetensorError as error:
            raise RequestError(f"{file}: damaged ({error}); remove it to begin anew") from None
        if facts.get("fingerprint") != self.fingerprint:
            raise RequestError(f"{file}: of a training with other settings; give another --work, or remove it")
        if facts["iteration"] > self.settings.iterations:
            raise RequestError(f"{file}: {facts['iteration']} iterations are done; give as many, or another --work")
        self._begin(Reach(**{name: value.numpy() for name, value in under(tensors, "reach.").items()}))
        self.policy.load_state_dict(under(tensors, "policy."))
        restore(self.optimiser, tensors, "optimiser")
        self.best = replace(self.first, **{n: value.numpy() for n, value in under(tensors, "best.").items()})
        self.start_rewards, self.best_rewards = (tensors[f"rewards.{name}"].numpy() for name in ("start", "best"))
        self.iteration, self.best_iteration, self.rate = facts["iteration"], facts["best"], facts["rate"]
        return True

    def _signed(self) -> epd.Table:
        """The best table, and where it came from."""
        from runtime.png import version

        gain = interval(self.gain)
        told = {
            "made by": f"epd.train rdpo {version()}",
            "rewards": dict(zip(self.names, self.weights.tolist(), strict=True)),
            "settings": asdict(self.settings),
            "prompts": len(self.prompts),
            "iteration": self.best_iteration,
            "validation": {"prompts": len(self.gain), "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high},
            "start": self.first.provenance,
        }
        return replace(self.best, provenance=told)


def _frozen(policy: Policy) -> Distribution:
    with torch.no_grad():
        found: Distribution = policy()
    return found


def read_log(work: Path) -> list[dict[str, Any]]:
    """What every iteration so far did; the first line is the given table on validation."""
    file = work / LOG
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    except ValueError:
        raise RequestError(f"{file}: damaged; give another --work, or remove the folder") from None


def _in_words(line: dict[str, Any]) -> str:
    text = f"{line['iteration']:4}  reward {line['reward']:.4f}  kl {line['kl']:.3f}  {line['seconds']:.1f} s"
    if "validation" in line:
        told = line["validation"]
        text += f"  validation {told['over start']:+.4f} ± {told['half width']:.4f} over the start"
    return text
