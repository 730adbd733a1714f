"""Names every error that Peregrine raises on purpose: one class for each thing the caller can do about it.

PeregrineError            catch this to catch them all; the message alone must be enough to act on
├── InvalidInput          fix the data, file or option that the message names        (exit code 2)
│   └── InvalidArgument   fix the request: a field of one call to `recommend`        (Triton: INVALID_ARG)
├── WiringError           fix contract.py: tensors that do not fit each other
├── ReleaseError          build again or activate another release: files missing or changed (exit code 2)
└── ServerError           look at the server: absent, not ready, died                (exit code 2)
"""


class PeregrineError(Exception):
    """Is the base of all errors raised on purpose; str(error) is one line fit to be shown to a user.

    fact  what is wrong: the name, what was wanted, what came
    cure  what to do about it; empty where the fact says it all
    """

    def __init__(self, fact: str, cure: str = "") -> None:
        super().__init__(f"{fact}; {cure}" if cure else fact)
        self.fact, self.cure = fact, cure


class InvalidInput(PeregrineError):
    """Says that data, a file or an option is wrong: its name, the value and the cure."""


class InvalidArgument(InvalidInput):
    """Says that one field of a request is wrong: "<field>: <rule>"."""


class WiringError(PeregrineError):
    """Says, when a pipeline is defined and not when it runs, that its models do not fit each other."""


class ReleaseError(PeregrineError):
    """Says that a release is absent, incomplete or not what its manifest says."""


class ServerError(PeregrineError):
    """Says that tritonserver is absent, did not become ready, or refused a control call."""
