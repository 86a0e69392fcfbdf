"""From a prompt to pictures: plan, then encode, prior, solve, decode.

    pipe = Pipeline.from_pretrained("shapes-sd3")
    pipe("a red circle on a white background", seed=1).images[0].save("picture.png")

Never imports torch. What was drawn with, and what it cost, is in the result's `plan` and `report`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

import epd

from . import tiling
from .amd_session import LIGHT, asked
from .assignment import Assignment, Fallback, fallback_of, summary
from .bundle import Bundle
from .cachekey import drivers
from .directions import check, settle
from .errors import NotFiniteError, ProviderError, RequestError
from .facts import REQUIRED, TINY_DECODER
from .footprint import predict
from .memory import peak_rss_bytes
from .noise import Stream
from .ort import base_wheels, installed, onnxruntime
from .plan import Plan, make_plan
from .profiles import Profile, machine
from .providers import CPU, check_options, provider_of
from .report import Clock, Report, Result
from .session import Session, check_low_memory, default_options
from .slopes import Slopes, directions_of
from .text import conditioning, forget_tokenizers

BUILT_IN = Path(__file__).parent / "bundles"  # package data
DEFAULT = "shapes-sd3"
log = logging.getLogger(__name__)


class Pipeline:
    """A bundle ready to draw. Sessions are loaded when first needed; text encoders are released before denoising.

    Parameters
    ----------
    provider : str
        Or several, as in "webgpu,cpu": the backbone is loaded on each and its work divided; all else is the first's,
        and so are the `provider_options`.
    directions : "auto" | "batch" | "calls" | "async" | "spread", optional
        How the points of a request are run. auto: whatever is fastest here, measured once and kept. None: spread for
        several providers; auto if that was measured before; else batch.
    low_memory : bool
        CPU only: fp32 weights stay in their files, mapped into memory; a session is released once its work is done.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str = "cpu",
        provider_options: Mapping[str, str] | None = None,
        session_options: Any = None,
        fallback: Fallback = "limited",
        directions: str | None = None,
        low_memory: bool = False,
    ) -> None:
        bundle.require(*REQUIRED[bundle.facts.family])
        rows = [asked(bundle, provider_of(one.strip())) for one in provider.split(",")]  # a wrong one is told now
        check_options(rows[0], provider_options or {})
        check(directions, len(rows))
        for row in rows if low_memory else ():
            check_low_memory(row)
        if low_memory and session_options is not None:
            raise ProviderError("low_memory sets session_options of its own; leave one of them out")
        if session_options is not None and len(rows) > 1:
            raise ProviderError("session_options are made for one provider; leave them out, or name one provider")
        self.providers = [row.ort for row in rows]  # ONNX Runtime's names
        self.bundle, self.provider, self.directions = bundle, provider, directions
        self.options = dict(provider_options or {})  # of the first provider
        self.low_memory = low_memory
        self._options: dict[str, Any] = {
            "provider_options": provider_options,
            "session_options": session_options,
            "low_memory": low_memory,
        }
        self._fallback = fallback_of(fallback)
        self._process = peak_rss_bytes()
        self._tiled = False  # whether it was told
        self.preview_seconds = 0.0  # spent so far
        self._sessions: dict[str, Session] = {}
        self._profiles: dict[tuple[int, ...], Profile] = {}  # by the shape of the latents

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT,
        *,
        provider: str = "cpu",
        provider_options: Mapping[str, str] | None = None,
        session_options: Any = None,
        fallback: Fallback = "limited",
        directions: str | None = None,
        low_memory: bool = False,
        threads: int = 0,
    ) -> Pipeline:
        """Opens a bundle: a folder, or the name of one that ships with this package.

        `threads`: of each graph on the CPU, where no `session_options` say so; 0: one per physical core.

        Raises
        ------
        BundleError, ProviderError, RequestError
        """
        bundle = Bundle.open(find(model))
        if bundle.facts.source.random_weights:
            log.warning("%s has RANDOM WEIGHTS: its pictures mean nothing, only its speed does", bundle.facts.name)
        if threads < 0 or (threads and (low_memory or "," in provider)):
            raise RequestError(f"threads are 0 or more, for one provider without low_memory; got {threads}")
        if threads and session_options is None:
            session_options = default_options(onnxruntime(), provider_of(provider), threads)
        return cls(
            bundle,
            provider=provider,
            provider_options=provider_options,
            session_options=session_options,
            fallback=fallback,
            directions=directions,
            low_memory=low_memory,
        )

    def plan(self, prompt: str, **asked: Any) -> Plan:
        """What a call with the same arguments would do, without doing it; see `runtime.plan.make_plan`."""
        return make_plan(self.bundle, prompt, **asked)

    def predict(self, plan: Plan, low_memory: bool | None = None) -> int | None:
        """Bytes of memory that this process will hold at most while it draws a plan: `runtime.footprint.predict`.

        `low_memory`: None for as this pipeline was opened. None for other providers than the CPU, for a bundle whose
        facts do not say what its graphs take, or where the system does not tell what the process has already.
        """
        if self._process is None or set(self.providers) != {CPU.ort}:
            return None
        return predict(self.bundle, plan, self.low_memory if low_memory is None else low_memory, self._process)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        latents: ArrayLike | None = None,
        solver: str | None = None,
        table: epd.Table | str | Path | None = None,
        k: int | None = None,
        calls: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        callback_on_step_end: Callable[[epd.Step], None] | None = None,
    ) -> Result:
        """Draws pictures of a prompt; image i has seed + i, and does not depend on the others.

        Parameters
        ----------
        prompt, negative_prompt : str
            May be empty. Longer ones than the text encoders take are cut, and a warning says what was lost.
        height, width : int, optional
            Pixels; the bundle's own if None.
        num_inference_steps : int, optional
            N intervals; the table's or the bundle's own if None.
        guidance_scale : float, optional
            1 or less: no guidance, half the work. The table's or the bundle's own if None.
        seed : int, optional
            Of the first image, as `torch.Generator("cpu").manual_seed`; None: a random one, told in the report.
        latents : (B, C, h, w), optional
            Start noise of unit variance in place of the seeds'. A noisy solver then has all of its noise from the
            seeds, as in diffusers with `latents` and a generator: give other latents than the seeds' own.
        solver : str, optional
            "epd", or a name of `epd.solvers.METHODS`; `python -m runtime solvers` lists them. None: epd with the
            bundle's first table if it has one, else the bundle's default. Those that are noisy (euler_ancestral, lcm)
            have one stream of noise per image: image i's generator of seed + i gives its start latents, then the noise
            of every step that needs some, as diffusers draws it with a list of generators.
        table : epd.Table, path or name, optional
            A file, or the name of a fetched or shipped table (`epd.catalogue`). Implies epd. Without any, epd takes
            `epd.start_table` of `k` directions (default 2) on the family's grid. A table that was made for something
            else (model, grid, guidance, size, T5) is used, and a warning says what differs.
        calls : int, optional
            The bundle's best table of at most so many sequential calls: the highest PSNR on held-out prompts.
        guidance_interval : (lo, hi), optional
            Sigma (SD3: in [0, 1]): guidance inside, ends included; outside, one row per point instead of two.
        output_type : "pil" | "np" | "latent"
        callback_on_step_end : callable, optional
            Called with every finished `epd.Step`; raise in it to stop.

        Raises
        ------
        RequestError
            What is asked for does not fit the bundle or the table.
        NotFiniteError
            NaN or infinity in a component's output; names the component and the step, or that it encoded or decoded.
        """
        if output_type not in ("pil", "np", "latent"):
            raise RequestError(f"output_type must be pil, np or latent, got {output_type!r}")
        plan = self.plan(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=secrets.randbits(32) if seed is None else seed,
            solver=solver,
            table=table,
            k=k,
            calls=calls,
            guidance_interval=guidance_interval,
        )
        return self.draw(plan, latents, output_type, callback_on_step_end)

    def draw(
        self,
        plan: Plan,
        latents: ArrayLike | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        callback_on_step_end: Callable[[epd.Step], None] | None = None,
    ) -> Result:
        """Carries out a plan: encode, prior, solve, decode."""
        try:
            return self._draw(plan, latents, output_type, callback_on_step_end)
        finally:
            self._release()

    def _draw(
        self,
        plan: Plan,
        latents: ArrayLike | None,
        output_type: Literal["pil", "np", "latent"],
        callback_on_step_end: Callable[[epd.Step], None] | None,
    ) -> Result:
        clock = Clock(self)
        with _stage("while encoding"):
            slopes = self.slopes([plan.prompt], plan.guidance, plan.negative_prompt, plan.guidance_interval)
        clock.lap("encode")

        streams = [Stream(seed) for seed in plan.seeds]  # one per image: its start, then its solver's noise

        def noise(x: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.stack([stream.randn(x.shape[1:]) for stream in streams]).astype(np.float64)

        start = noise(np.empty((len(streams), *plan.latent_shape))) if latents is None else _given(plan, latents)
        x = plan.start_scale * start  # (B, C, h, w)
        self._settle(plan, slopes, x, clock)
        step = epd.Step(-1, plan.times[0], x, 0, 0)
        try:
            for step in epd.solve(plan.coroutine(noise), x, slopes):
                if callback_on_step_end is not None:
                    callback_on_step_end(step)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error} (at step {step.index + 2} of {plan.steps})") from None
        except FloatingPointError:
            raise NotFiniteError(
                f"{slopes.backbone.component}: NaN or infinity in its guided slope, at guidance scale "
                f"{plan.guidance:g}; give a smaller one (at step {step.index + 2} of {plan.steps})"
            ) from None
        x = step.x / plan.end_scale
        clock.lap("denoise")

        self._release()
        with _stage("while decoding"):
            images: Any = x.astype(np.float32) if output_type == "latent" else self.decode(x)
        if output_type == "pil":
            images = [picture_of(image) for image in images]
        clock.lap("decode")
        return Result(images, plan, self._report(plan, step, slopes, clock))

    def slopes(
        self,
        prompts: Sequence[str],
        guidance: float,
        negative_prompt: str = "",
        interval: tuple[float, float] | None = None,
    ) -> Slopes:
        """The network as a solver sees it, told one prompt per image, or one for all of them; guided above 1.

        Many prompts in one batch give each image what it gets alone.

        Raises
        ------
        BundleError, ProviderError
        """
        guided = guidance > 1
        told = conditioning(self.bundle, self._session, [negative_prompt, *prompts] if guided else prompts)
        if guided:
            halves = {  # (H, B, ...)
                name: np.stack([np.broadcast_to(value[:1], value[1:].shape), value[1:]]) for name, value in told.items()
            }
        else:
            halves = {name: value[None] for name, value in told.items()}
        if self.bundle.facts.target == LIGHT.name:
            self._session("vae_decoder").load()  # the first one sets the size of a buffer, and it needs the larger
        backbone = self._session(self.bundle.backbone).load()
        others = [self._session(self.bundle.backbone, index).load() for index in range(1, len(self.providers))]
        return Slopes(backbone, self.bundle.facts, halves, guidance, directions_of(backbone), interval, others)

    def decode(self, x: NDArray[np.float64]) -> NDArray[np.float32]:
        """Latents (B, C, h, w) to pictures (B, H, W, 3) in [0, 1]; one at a time, for memory.

        In tiles, where the decoder's graph is for smaller pictures: see `runtime.tiling`.
        """
        latent, decoder = self.bundle.facts.latent, self._session("vae_decoder")
        scaled = x / latent.scaling + latent.shift
        shapes = {tensor.name: tensor.shape for tensor in decoder.inputs}
        tile = tiling.tile_of(shapes.get("latent_sample", ()), x.shape)
        if (told := tiling.told(tile, x.shape, latent.factor)) and not self._tiled:
            log.warning("%s", told)
            self._tiled = True

        def run(part: NDArray[np.float64]) -> NDArray[Any]:
            return decoder(latent_sample=part, want=["sample"])["sample"]

        return _pixels(np.concatenate([tiling.decode(run, row[None], tile) for row in scaled]))

    def preview(self, x: NDArray[np.float64]) -> NDArray[np.float32]:
        """As `decode`, roughly and fast, by the bundle's tiny VAE decoder; by the whole one where it has none.

        For `Step.denoised / plan.end_scale` in a `callback_on_step_end`, whose time it keeps out of the denoising's.
        """
        tiny = TINY_DECODER in self.bundle.facts.components
        session = self._session(TINY_DECODER if tiny else "vae_decoder").load()
        if not tiny and not self.preview_seconds:
            log.warning("%s has no tiny VAE decoder: each preview is a whole decoding", self.bundle.facts.name)
        started = time.perf_counter()
        try:
            return _pixels(session(latent_sample=x, want=["sample"])["sample"]) if tiny else self.decode(x)
        finally:
            self.preview_seconds += time.perf_counter() - started
            if self.low_memory:
                session.unload()

    @property
    def assignment(self) -> Assignment | None:
        """Where the backbone's nodes run; None before it is loaded, or where onnxruntime cannot tell."""
        return self._session(self.bundle.backbone).assignment

    def close(self) -> None:
        """Releases all sessions and tokenizers; they are loaded again when needed."""
        forget_tokenizers()
        for session in self._sessions.values():
            session.unload()

    def _release(self) -> None:
        """What has done its work in a drawing, if memory is to be low."""
        if self.low_memory:
            self.close()

    def identity(self) -> str:
        """Of the weights: the bundle's, or the sizes and times of a foreign folder's files."""
        bundle = self.bundle
        files = sorted(bundle.folder.rglob("*.onnx*")) if bundle.foreign else []
        return bundle.fingerprint() or repr([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    @property
    def sessions(self) -> Mapping[str, Session]:
        """Those made so far, by component; the backbone's on further providers as `COMPONENT 1` and so on."""
        return self._sessions

    def profile(self, plan: Plan) -> Profile:
        """What is known here of the speed of this bundle's backbone, at the size of a plan."""
        if plan.latent_shape not in self._profiles:
            self._profiles[plan.latent_shape] = Profile(self._key(plan))
        return self._profiles[plan.latent_shape]

    def _key(self, plan: Plan) -> dict[str, Any]:
        """All that the cost of the backbone's calls depends on, but for their rows."""
        options = self._options["session_options"]
        settings = ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "graph_optimization_level")
        rows = [provider_of(name) for name in self.providers]
        plugins = [plugin.package for row in rows for plugin in row.plugins]
        return {
            "bundle": self.identity(),
            "providers": self.providers,
            "options": self.options,
            "latent": plan.latent_shape,
            "session": [str(getattr(options, name, "")) for name in settings] + ["low memory"] * self.low_memory,
            "packages": {"onnxruntime": onnxruntime().__version__} | base_wheels() | installed(plugins),
            "drivers": {row.name: drivers(row) for row in rows},
            "machine": machine(),
        }

    def _session(self, component: str, index: int = 0) -> Session:
        """Of a component, on the provider of that index."""
        name = f"{component} {index}" if index else component
        if name not in self._sessions:
            options = self._options | ({"provider_options": None} if index else {})
            self._sessions[name] = Session(
                self.bundle, component, provider=self.providers[index], fallback=self._fallback, **options
            )
        return self._sessions[name]

    def _settle(self, plan: Plan, slopes: Slopes, x: NDArray[np.float64], clock: Clock) -> None:
        """The way to run the plan's directions, x (B, C, h, w) its first state; the clock has what measuring took."""
        times = plan.times[0] * np.linspace(1, 0.9, plan.points)  # each of its own, as in the requests to come
        profile = self.profile(plan)
        profile.anew = False
        settle(slopes, self.directions, epd.Points(np.repeat(x[None], plan.points, 0), times), profile)
        if profile.anew:
            clock.lap("measure")
        if slopes.directions == "calls" and self.directions is None and plan.wide and not slopes.per_row:
            log.warning(
                "%s takes one timestep for all rows: the points of a request run as calls in turn, not as one batch",
                slopes.backbone.path,
            )

    def _report(self, plan: Plan, last: epd.Step, slopes: Slopes, clock: Clock) -> Report:
        assignments = [session.assignment for session in self._sessions.values()]
        facts, ran = self.bundle.facts, [slopes.sessions[index] for index in sorted(slopes.ran)]
        return Report(
            seeds=plan.seeds,
            prompt=plan.prompt,
            solver=plan.solver,
            steps=plan.steps,
            sequential_calls=last.calls,
            total_evaluations=last.evaluations,
            guided_forwards=slopes.guided_forwards,
            guidance_interval=plan.guidance_interval,
            provider={"asked": self.provider, "ran": ",".join(session.provider for session in ran)}
            | summary(assignments)
            | {"retries": clock.retries()},
            directions=slopes.directions,
            seconds=clock.seconds(last.calls),
            predicted_rss_bytes=self.predict(plan),
            peak_rss_bytes=peak_rss_bytes(),
            bundle={"name": facts.name, "sha256": self.bundle.fingerprint()},
        )


@contextmanager
def _stage(when: str) -> Iterator[None]:
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{error} ({when})") from None


def find(model: str | Path) -> Path:
    """The folder of a model: one that ships with this package by its name, or any path."""
    if not str(model):
        raise RequestError("the model is an empty text; give a bundle's folder, or leave it out")
    shipped = BUILT_IN / model
    if Path(model).name == str(model) and (shipped / "bundle.json").is_file():
        return shipped
    if str(model) == DEFAULT and not Path(model).is_dir():
        raise RequestError(
            f"{DEFAULT} is not in this installation; make it with `python -m export {DEFAULT} -o DIR` "
            "and give --model DIR"
        )
    return Path(model)


def _pixels(pictures: NDArray[Any]) -> NDArray[np.float32]:
    """(B, 3, H, W) in [-1, 1], or a little beyond, to (B, H, W, 3) in [0, 1]."""
    pixels: NDArray[np.float32] = np.clip(pictures.astype(np.float32) / 2 + np.float32(0.5), 0, 1)
    return pixels.transpose(0, 2, 3, 1)


def picture_of(pixels: NDArray[np.float32]) -> Image.Image:
    """Of one image, (H, W, 3) in [0, 1]."""
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def _given(plan: Plan, latents: ArrayLike) -> NDArray[np.float64]:
    """The start noise that was given in place of the seeds'."""
    given = np.asarray(latents, np.float64)
    if given.shape != (len(plan.seeds), *plan.latent_shape):
        raise RequestError(f"latents must be {[len(plan.seeds), *plan.latent_shape]}, got {list(given.shape)}")
    if not np.isfinite(given).all():
        raise RequestError("latents must be finite numbers, got NaN or infinity")
    return given
