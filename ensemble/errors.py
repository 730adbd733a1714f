"""Every error Peregrine raises on purpose. One class per thing the caller can do about it.

PeregrineError            catch this to catch them all; the message alone must be enough to act on
├── InvalidInput          fix the data, file or option that the message names        (exit code 2)
│   └── InvalidArgument   fix the request: a field of one call to `recommend`        (Triton: INVALID_ARG)
├── WiringError           fix contract.py: tensors that do not fit each other
├── ReleaseError          build again or activate another release: missing, half or changed files (exit code 2)
└── ServerError           look at the server: absent, not ready, died                (exit code 2)
"""


class PeregrineError(Exception):
    """Base of all errors raised on purpose; str(error) is one line fit to be shown to a user."""


class InvalidInput(PeregrineError):
    """Data, a file or an option is wrong; the message names it, the value and the cure."""


class InvalidArgument(InvalidInput):
    """One field of a request is wrong: "<field>: <rule>"."""


class WiringError(PeregrineError):
    """Models of a pipeline do not fit each other; raised when the pipeline is defined, not when it runs."""


class ReleaseError(PeregrineError):
    """A release is absent, incomplete or not what its manifest says."""


class ServerError(PeregrineError):
    """tritonserver is absent, did not become ready, or refused a control call."""
