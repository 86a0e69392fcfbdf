"""Sessions of AMD's prebuilt graphs: the two ways to open them, and our names and inputs in place of theirs.

From Ryzen AI 1.8 on, a plugin provider runs them; before, a library of operators within the CPU provider does. Written
after AMD's published programs (see `runtime.amd`); the operators themselves were never run. Knows nothing of pipelines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import amd, ryzenai
from .assignment import Fallback
from .bundle import Bundle
from .errors import BundleError, ProviderError
from .ort import add_provider, failures, library_of, one_line
from .providers import CPU, PROVIDERS, Provider

LIGHT = PROVIDERS[amd.TARGET]
_PLUGIN = (1, 8)  # first release of Ryzen AI whose prebuilt graphs want the plugin provider
_OLDEST = (1, 5)  # first release with Stable Diffusion 3
_CONTROL = "block_controlnet_hidden_states_"  # inputs that zeros are given to
_DOMAINS = ("", "ai.onnx", "com.microsoft", "ai.onnx.ml", "com.microsoft.nchwc")  # ONNX Runtime's; others are AMD's
_DTYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
_ANSWERS = {"transformer": "out_hidden_states", "vae_decoder": "sample", "text_encoder_3": "last_hidden_state"}


class Settled(NamedTuple):
    """What a component is opened with."""

    row: Provider
    options: dict[str, str]
    fallback: Fallback


def settle(
    bundle: Bundle, component: str, provider: Provider, options: Mapping[str, str] | None, fallback: Fallback
) -> Settled:
    """What a component is opened with, where `provider` is asked for.

    Of AMD's folder its NPU graphs run on AMD's plugin provider, which `vitisai` stands for, too, and its plain graphs
    on the CPU. How much of an NPU graph may be left to the CPU, AMD has decided: it is told, and refused only if
    `never`, or if nothing is on the NPU.

    Raises
    ------
    ProviderError
        A provider that AMD's graphs cannot run on.
    """
    row = asked(bundle, provider)
    if bundle.facts.target != amd.TARGET or row is CPU:
        return Settled(row, dict(options or {}), fallback)
    if amd.is_compiled(bundle.graph(component)):
        return Settled(row, dict(options or {}), "allowed" if fallback == "limited" else fallback)
    if fallback == "never":
        raise ProviderError(f"{component}: AMD's folder has it as a plain graph, for the CPU; leave --strict out")
    return Settled(CPU, {}, fallback)


def asked(bundle: Bundle, row: Provider) -> Provider:
    """The provider that a bundle runs on where `row` is asked for; ProviderError if AMD's graphs cannot run on it."""
    if bundle.facts.target != amd.TARGET:
        return row
    if row not in (CPU, LIGHT, PROVIDERS["vitisai"]):
        raise ProviderError(f"{bundle.folder}: AMD's prebuilt graphs run on its NPU alone; give --provider vitisai")
    return CPU if row is CPU else LIGHT


def create(
    ort: ModuleType, bundle: Bundle, graph: Path, options: Any, row: Provider, chosen: Mapping[str, str], shared: bool
) -> Adapted:
    """A session of one graph of AMD's folder, with our names.

    Parameters
    ----------
    shared
        The session options are the caller's, for several sessions.

    Raises
    ------
    ProviderError
        No Ryzen AI installation, another release than the folder's, an NPU too old, a library that is missing or does
        not load, nothing of the graph on the NPU; or AMD's operators on the CPU.
    BundleError
        A piece of the folder is missing.
    RuntimeError, ValueError, or onnxruntime's own
        The graph does not load.
    """
    if row is CPU:
        return Adapted(_on_cpu(ort, graph, options), graph, bundle, None)
    if shared:
        raise ProviderError(
            "session_options cannot be given for AMD's prebuilt graphs, each has its own; leave them out"
        )
    here = ryzenai.software()
    _check_machine(bundle.folder, here)
    told = _told(graph) | dict(chosen)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    names: list[str] | None = None
    operators = None if _by_plugin(here) else LIGHT.ort
    if operators is None:
        add_provider(ort, options, LIGHT, told)
        library = Path(library_of(LIGHT) or "")
    else:
        library, names = _operators(here), [CPU.ort]
        for name, value in told.items():
            options.add_session_config_entry(name, value)
    try:
        options.register_custom_ops_library(str(library))  # the last thing, after all its settings
    except failures(ort) as error:
        raise ProviderError(
            f"{library}: AMD's operators do not load ({one_line(error)}); install Ryzen AI again"
        ) from None
    session = ort.InferenceSession(graph, options, names, enable_fallback=0)
    return Adapted(session, graph, bundle, operators).checked()


def _told(graph: Path) -> dict[str, str]:
    """What AMD's operators are told of the graph, forward slashes in the paths."""
    told = {"dd_cache": amd.compiled_pieces(graph).absolute().as_posix(), "onnx_custom_ops_const_key": ""}
    data = graph.with_name(f"{graph.name}.data")
    if data.is_file():
        told["external_data_file"] = data.absolute().as_posix()
    return told


def _on_cpu(ort: ModuleType, graph: Path, options: Any) -> Any:
    try:
        return ort.InferenceSession(graph, options, [CPU.ort], enable_fallback=0)
    except failures(ort) as error:
        if "not a registered function/op" not in str(error):
            raise
        raise ProviderError(
            f"{graph}: has operators of AMD's own ({one_line(error)}); give --provider vitisai"
        ) from None


def _check_machine(folder: Path, here: ryzenai.Software) -> None:
    wanted = amd.made_for(folder)
    for npu in ryzenai.npus()[:1]:
        if npu.integers_only:
            raise ProviderError(f"{folder}: AMD's prebuilt graphs need a Strix or newer, here is {npu}; take a bundle")
    if here.installation is None and library_of(LIGHT) is None:
        raise ProviderError(
            f"{folder}: AMD's prebuilt graphs need its Ryzen AI software, and {ryzenai.INSTALLATION} names no folder; "
            f"{LIGHT.remedy}"
        )
    if here.version and here.version[:2] < _OLDEST:
        raise ProviderError(
            f"{here.installation}: Ryzen AI {here.release} has no Stable Diffusion 3; install 1.8 or newer"
        )
    if wanted and here.version and ryzenai.version_of(wanted)[:2] != here.version[:2]:
        raise ProviderError(
            f"{folder}: made for Ryzen AI {wanted}, installed is {here.release} ({here.installation}); its graphs run "
            f"on their own release alone: download the folder's revision for {here.release}, or install {wanted}"
        )


def _by_plugin(here: ryzenai.Software) -> bool:
    """Whether this release wants the plugin provider; of one that cannot be told, whether it has no other."""
    return here.version[:2] >= _PLUGIN if here.version else ryzenai.operator_library(here) is None


def _operators(here: ryzenai.Software) -> Path:
    """The library of AMD's operators of releases before 1.8, loaded."""
    library = ryzenai.operator_library(here)
    if library is None:
        raise ProviderError(
            f"{here.installation}: no library of AMD's operators (onnx_custom_ops) in this Ryzen AI {here.release}; "
            "install it again, with GenAI-SD"
        )
    try:
        ryzenai.load_beside(library, here)
    except OSError as error:
        raise ProviderError(
            f"{library}: does not load ({one_line(error)}); install or update the NPU's driver"
        ) from None
    return library


@dataclass(frozen=True)
class Argument:
    """An input or output as onnxruntime describes one."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class Adapted:
    """An onnxruntime session of one of AMD's graphs, with the names of our exports; its ControlNet inputs get zeros.

    `operators`: the provider that nodes of AMD's operators are told to be on, where they are a library of the CPU's.
    """

    def __init__(self, session: Any, graph: Path, bundle: Bundle, operators: str | None) -> None:
        self._session, self._graph, self._operators = session, graph, operators
        self._patch = bundle.facts.latent.patch
        component = next(name for name, part in bundle.facts.components.items() if bundle.folder / part.graph == graph)
        inputs, outputs = session.get_inputs(), session.get_outputs()
        self._zeros = [one for one in inputs if one.name.startswith(_CONTROL)]
        given = [one for one in inputs if not one.name.startswith(_CONTROL)]
        ours = {"vae_decoder": "latent_sample"}.get(component, "input_ids")
        self._inputs = {one.name if component == "transformer" else ours: one for one in given}
        if len(self._inputs) != len(given):
            raise BundleError(f"{graph}: more inputs ({', '.join(one.name for one in given)}) than {ours}")
        self._outputs = {name: outputs[index] for name, index in _answers(component, outputs).items()}

    def checked(self) -> Adapted:
        """Itself; ProviderError if nothing of it is on the NPU. (An onnxruntime before 1.24 cannot tell.)"""
        placed = self.get_provider_graph_assignment_info()
        if placed and not any(part.ep_name.lower() == LIGHT.ort.lower() for part in placed):
            raise ProviderError(f"{self._graph}: none of its nodes would run on the NPU; {LIGHT.remedy}")
        return self

    def get_inputs(self) -> list[Argument]:
        return [Argument(name, one.type, one.shape) for name, one in self._inputs.items()]

    def get_outputs(self) -> list[Argument]:
        return [Argument(name, one.type, one.shape) for name, one in self._outputs.items()]

    def get_providers(self) -> list[str]:
        """AMD's plugin provider first, also where its operators come as a library of the CPU provider."""
        ran: list[str] = self._session.get_providers()
        return ran if self._operators in (None, ran[0]) else [str(self._operators), *ran]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        told: dict[str, dict[str, str]] = self._session.get_provider_options()
        return told

    def disable_fallback(self) -> None:
        self._session.disable_fallback()

    def get_provider_graph_assignment_info(self) -> list[Any]:
        """Of every node its provider; empty where none can be told."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return []
        parts = self._session.get_provider_graph_assignment_info()
        return [_Part(self._operators or part.ep_name if foreign else part.ep_name, nodes)
                for part in parts for foreign, nodes in _divided(part.get_nodes())]  # fmt: skip

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]], options: Any = None) -> list[NDArray[Any]]:
        theirs = {self._inputs[name].name: value for name, value in feeds.items()}
        for one in self._zeros:
            theirs[one.name] = np.zeros(self._sizes(one, feeds["hidden_states"].shape), _DTYPES[one.type])
        answers: list[NDArray[Any]] = self._session.run([self._outputs[name].name for name in names], theirs, options)
        return answers

    def _sizes(self, one: Any, latent: Sequence[int]) -> list[int]:
        """Of a ControlNet input: rows, tokens of the picture, width; what the graph leaves open, from the latents'."""
        rows, _, height, width = latent
        known = [rows, height * width // self._patch**2]
        sizes = [
            size if isinstance(size, int) else known[axis] if axis < 2 else 0 for axis, size in enumerate(one.shape)
        ]
        if len(sizes) != 3 or not all(sizes):
            raise BundleError(f"{self._graph}: input {one.name} of shape {one.shape}, expected [rows, tokens, width]")
        return sizes


class _Part(NamedTuple):
    """Nodes on one provider, as onnxruntime tells of them."""

    ep_name: str
    nodes: Sequence[Any]

    def get_nodes(self) -> Sequence[Any]:
        return self.nodes


def _divided(nodes: Iterable[Any]) -> list[tuple[bool, list[Any]]]:
    """Nodes of AMD's operators (True) and of others."""
    theirs: dict[bool, list[Any]] = {True: [], False: []}
    for node in nodes:
        theirs[node.domain not in _DOMAINS].append(node)
    return [(foreign, found) for foreign, found in theirs.items() if found]


def _answers(component: str, outputs: Sequence[Any]) -> dict[str, int]:
    """Our output name -> index of theirs.

    Of CLIP the pooled output and all hidden states; where they have names of their own the last two, the one before
    the last being what is wanted.
    """
    names = [one.name for one in outputs]
    if component in _ANSWERS:
        return {_ANSWERS[component]: 0}
    states = {name: index for index, name in enumerate(names) if name.startswith("hidden_states.")}
    if len(states) < 2:
        states = {"hidden_states.0": len(names) - 2, "hidden_states.1": len(names) - 1}
    pooled = next((names.index(name) for name in ("text_embeds", "pooler_output") if name in names), 0)
    return {"text_embeds": pooled} | states
