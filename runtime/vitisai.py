"""What Vitis AI, the provider of AMD's NPU, is told of a graph: configuration, target.

Written from AMD's documentation of Ryzen AI 1.4 to 1.8; nothing in it was run on an NPU. Knows nothing of sessions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epd.catalogue import cache_folder
from epd.table import write_whole

from .bundle import Bundle
from .errors import ProviderError
from .providers import PROVIDERS, Provider
from .ryzenai import Npu, npus, software

VITISAI = PROVIDERS["vitisai"]

_LAYOUTS = {"transformer": "unvectorized", "unet": "vectorized", "vae_decoder": "vectorized"}  # text: as transformers
_LEVEL = 2  # 1 is Vitis AI's own; others measured it several times slower than 2 and 3, and 3 twice as long to compile
_OVERLAY = "voe-4.0-win_amd64/xclbins/phoenix/4x4.xclbin"  # of an installation
_FLOATS = ("fp32", "fp16", "fp16-weights", "bf16")
_REPORT = ("XLNX_ONNX_EP_REPORT_FILE", "vitisai_ep_report.json")  # has Vitis AI write into the cache where nodes run
log = logging.getLogger(__name__)


def configuration(component: str) -> dict[str, Any]:
    """What Vitis AI's compiler is told of a float graph, which it turns into bf16: the content of `config_file`."""
    passes = ["init", "vaiml_partition"]
    settings = {"optimize_level": _LEVEL, "preferred_data_storage": _LAYOUTS.get(component, "unvectorized")}
    described: list[dict[str, Any]] = [{"name": name, "plugin": f"vaip-pass_{name}"} for name in passes]
    described[-1]["vaiml_config"] = settings
    return {"passes": described, "target": "VAIML", "targets": [{"name": "VAIML", "pass": passes}]}


def completed(row: Provider, bundle: Bundle, component: str, chosen: Mapping[str, str]) -> dict[str, str]:
    """The options `chosen` for a graph, with those that Vitis AI needs; of another provider the chosen ones.

    A float graph gets a configuration, an integer one on the first generation its target and overlay.

    Raises
    ------
    ProviderError
        This NPU cannot run such a graph, or not with these options.
    """
    options = dict(chosen)
    if row is not VITISAI:
        return options
    if "config_file" in options and not Path(options["config_file"]).is_file():
        raise ProviderError(f"{VITISAI.ort}: no config_file {options['config_file']}; give a file, or leave it out")
    floats = bundle.facts.components[component].precision in (*_FLOATS, "unknown")
    here = software()
    for npu in npus()[:1]:
        _check(npu, component, floats, options)
        if npu.integers_only:
            options.setdefault("target", "X1")
            if here.installation and (here.installation / _OVERLAY).is_file():
                options.setdefault("xclbin", str(here.installation / _OVERLAY))
    try:
        folder = cache_folder() / "vitisai"
    except ValueError as error:
        log.warning("%s; Vitis AI compiles with its own settings", error)
        return options
    if floats and "config_file" not in options:
        options["config_file"] = str(_written(folder, configuration(component)))
    os.environ.setdefault(*_REPORT)
    return options


def _check(npu: Npu, component: str, floats: bool, options: Mapping[str, str]) -> None:
    if npu.integers_only and floats:
        raise ProviderError(
            f"{component}: {npu} runs integer graphs alone, this one is of floats, which need Strix or newer; "
            "give --provider directml or cpu, or export it with --dtype int8"
        )
    if not npu.integers_only and "xclbin" in options:
        raise ProviderError(
            f"{VITISAI.ort}: xclbin is for Phoenix and Hawk Point, on {npu} it must not be set: the compiler brings "
            "its own; leave it out"
        )
    if npu.integers_only and options.get("target", "X1") != "X1":
        raise ProviderError(f"{VITISAI.ort}: target {options['target']} needs Strix or newer, here is {npu}; give X1")


def _written(folder: Path, content: Mapping[str, Any]) -> Path:
    """The file with this content, for it is named after it."""
    file = folder / f"config-{_digest(content)}.json"
    if not file.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            raise ProviderError(f"{file}: {error.strerror}; set EPD_CACHE to a folder that can be written") from None
    return file


def _digest(content: Mapping[str, Any]) -> str:
    """Short, for Windows' paths end at 260 characters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
