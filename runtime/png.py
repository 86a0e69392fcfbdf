"""Pictures as PNG files that say how they were made, in the grammar other tools read, and back again.

The text chunk `parameters` holds the prompt, a line `Negative prompt: ...` and one line `Key: value, Key: value`; a
value with a comma, a quote or a line break is written as a JSON string. Our own keys stand at the end.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from .errors import RequestError

CHUNK = "parameters"
_NEGATIVE = "Negative prompt: "
_PAIR = re.compile(r'\s*([^:,"]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_PLAIN = re.compile(r'[^,"\n\r\s](?:[^,"\n\r]*[^,"\n\r\s])?')


def version() -> str:
    """Version of this program."""
    try:
        return importlib.metadata.version("epd-toolkit")
    except importlib.metadata.PackageNotFoundError:  # run from a source folder
        return "source"


def format_parameters(prompt: str, negative_prompt: str, settings: dict[str, Any]) -> str:
    """The text of the chunk; `parse_parameters` gives all three back, exactly."""
    body = prompt + ("\n" + _NEGATIVE + negative_prompt if negative_prompt else "")
    text = f"{body}\n{_line(settings)}"
    if parse_parameters(text)[:2] == (prompt, negative_prompt):
        return text
    # A prompt that this grammar cannot hold, with line breaks at its ends or a line that looks like a negative one.
    return f"{body}\n{_line(settings | {'Prompt': json.dumps(prompt), 'Negative': json.dumps(negative_prompt)})}"


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings from the text of the chunk, ours or another tool's.

    Raises
    ------
    RequestError
        If the last line holds no settings, or damaged ones.
    """
    body, _, last = text.rpartition("\n")
    settings = {key.strip(): _unquoted(value) for key, value in _PAIR.findall(last)}
    if "Steps" not in settings:
        raise RequestError("no line `Steps: ..., Seed: ...` in the picture's metadata; give a picture of this program")
    before, found, negative = ("\n" + body).partition("\n" + _NEGATIVE)
    prompt, negative = before[1:], negative if found else ""
    if "Prompt" in settings:
        try:
            prompt, negative = (str(json.loads(settings.pop(key))) for key in ("Prompt", "Negative"))
        except (KeyError, ValueError):
            raise RequestError("damaged metadata: no prompt in it; give the prompt and the settings by hand") from None
    return prompt, negative, settings


def read_parameters(file: Path) -> tuple[str, str, dict[str, str]]:
    """As `parse_parameters`, of a picture; RequestError if it cannot be read or has no metadata."""
    try:
        with Image.open(file) as image:
            image.load()
            text = image.info.get(CHUNK)
    except (UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow calls damage
        raise RequestError(f"{file}: not a picture of this program; give a PNG made by it") from None
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror or error}; give a PNG made by this program") from None
    if not isinstance(text, str):
        raise RequestError(f"{file}: no metadata in this picture; give a PNG made by this program")
    try:
        return parse_parameters(text)
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from None


def save(image: Image.Image, file: Path, parameters: str | None = None) -> None:
    """Writes a PNG with its parameters, if any, to a temporary name first; OSError leaves nothing behind."""
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text(CHUNK, parameters)
    partial = _partial(file)
    try:
        image.save(partial, format="PNG", pnginfo=info)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(file: Path, suffix: str = ".png") -> None:
    """RequestError if a file of this suffix cannot be written there: called before the work starts.

    Does what `save` will do, with an empty file: writes its temporary name, and renames it if that replaces nothing.
    """
    if file.suffix.lower() != suffix:
        raise RequestError(f"{file}: it is written as {suffix}; give such a name")
    partial = _partial(file)
    try:
        if file.is_dir():
            raise RequestError(f"{file}: a folder; give a file name")
        partial.touch()
        if file.exists():
            with file.open("r+b"):  # neither read-only nor, on Windows, open elsewhere
                pass
        elif not file.is_symlink():
            os.replace(partial, file)
            file.unlink()
    except OSError as error:
        raise RequestError(f"{file}: cannot be written ({error.strerror}); give another -o/--output") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _partial(file: Path) -> Path:
    """The temporary name of a file that is being written: short, that any name may be given to the file."""
    return file.parent / f".{os.getpid()}.partial"


def _line(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items())


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value
