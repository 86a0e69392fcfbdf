"""From a diffusers checkpoint (torch) to a bundle of ONNX graphs. Run as `python -m export`."""


class ExportError(ValueError):
    """An export that cannot be done, or whose result would be wrong. The message is one line with the remedy."""
