"""What can be refused, in one tree. Every message is one line with the remedy; the command line prints it and exits 2.

ValueError
└── RunError     anything below
    ├── BundleError    a folder that is no bundle, is damaged, or lacks a component
    ├── ProviderError  no onnxruntime, two of them, or a provider that is not there or would fall back
    ├── RequestError   a size, step count, table, tensor or file that does not fit
    └── NotFiniteError      NaN or infinity in a component's output
"""


class RunError(ValueError):
    """Base of the errors of this package."""


class BundleError(RunError):
    """A folder that is no bundle, or one that breaks its own rules."""


class ProviderError(RunError):
    """ONNX Runtime is missing, doubled, or cannot run a component on the provider that was asked for."""


class RequestError(RunError):
    """Something asked for that this bundle cannot do, or a tensor that does not fit a graph."""


class NotFiniteError(RunError):
    """NaN or infinity in the output of a component; the message names component and step."""
