"""A contender's process: started, told its job, listened to, ended. Knows nothing of what is compared."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import profiles
from runtime.errors import RequestError

if TYPE_CHECKING:
    from .peers import Contender

_ALLOCATION = re.compile("allocat|MemoryError|bad_alloc|out of memory", re.IGNORECASE)
_KILLED = (-9, 137)  # exit status where the system ends a process for want of memory
log = logging.getLogger(__name__)


def turn_of(one: Contender, job: Mapping[str, Any], place: Path, when: str) -> dict[str, Any]:
    """What a contender's process says of a job; `runs`: its timed ones. It ends with this call, however that ends.

    Parameters
    ----------
    place : Path
        A folder for files, and where it runs.
    when : str
        For the line that tells that it failed.

    Raises
    ------
    RequestError
        It failed, or ran out of memory.
    """
    found: dict[str, Any] = {"runs": []}
    with tempfile.TemporaryFile(dir=place) as errors:
        process = subprocess.Popen(
            one.command,
            cwd=place,
            env=one.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        )
        try:
            for line in _lines(process, json.dumps(job)):
                said = json.loads(line)
                if "run" in said:
                    found["runs"].append(said["run"])
                else:
                    found |= said
            status = process.wait()
        finally:
            process.kill()
            process.communicate()
        if status:
            errors.seek(0)
            raise _crashed(one, status, when, errors.read().decode(errors="replace"))
    return found


def _lines(process: subprocess.Popen[str], job: str) -> Iterator[str]:
    assert process.stdin is not None  # both are pipes
    assert process.stdout is not None
    try:
        process.stdin.write(job + "\n")
        process.stdin.flush()
    except BrokenPipeError:  # it has ended: its status tells
        return
    yield from process.stdout


def _crashed(one: Contender, status: int, when: str, errors: str) -> RequestError:
    line = ([line.strip() for line in errors.splitlines() if line.strip()] or ["it said nothing"])[-1]
    if status in _KILLED or _ALLOCATION.search(line):
        return RequestError(
            f"{one.name} ran out of memory {when}, or was killed for it ({line:.200}); close other programs, "
            "leave it out of --against, or compare a smaller model"
        )
    return RequestError(f"{one.name} failed {when} (exit status {status}): {line:.300}")


def export(one: Contender, place: Path) -> None:
    """Has a contender make the folder that it reads, whole or not at all, where it is not there yet."""
    if one.exports is None:
        return
    folder = Path(one.exports["export"])
    log.warning("%s exports the checkpoint, once, to %s", one.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as aside:
        whole = Path(aside) / folder.name
        turn_of(one, dict(one.exports) | {"export": str(whole)}, place, "while exporting")
        os.replace(whole, folder)


class Others(profiles.Others):
    """What programs take that are neither this one nor started by it; those must have ended when it is asked."""

    @staticmethod
    def _seconds() -> float | None:
        found, times = profiles.Others._seconds(), os.times()
        return None if found is None else found - times.children_user - times.children_system
