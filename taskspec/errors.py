"""Every error that taskspec raises on purpose, as one tree.

    TaskspecError
    ├── ConfigError      a key or value of the configuration
    ├── DataError        a task file, a knowledge source, one of their records
    ├── StoreError       a URI that cannot be read or written
    ├── ArtifactError    a folder that is not the artifact it should be: kind, version, checksum
    ├── ContractError    checkpoint and index (or request) that do not belong together
    ├── RecallError      an index that finds less than it should
    ├── PlacementError   the cluster cannot hold the job
    ├── TrainingError    a run that cannot go on: a state that does not fit, a worker that fails again and again
    │   └── DivergedError    gradients that are not finite: starting the workers again would not help
    ├── RequestError     a query that the retriever cannot answer: unknown task, top_k out of range
    └── EndpointError    what a client got from the endpoint, or did not get in time

A message says where, which rule, what value, and the way out. Errors are caught at the edge: a job ends with
one line and status 2, the server maps them to a status code.
"""


class TaskspecError(Exception):
    """Base of all errors with a message for the user."""


class ConfigError(TaskspecError):
    """The configuration breaks a rule; the message names the key, the value and the known ones."""


class DataError(TaskspecError):
    """Input data breaks a rule; the message names file and line where there are any."""


class StoreError(TaskspecError):
    """A URI cannot be read or written."""


class ArtifactError(TaskspecError):
    """A folder is not the artifact it should be; the message names the field or the file."""


class ContractError(TaskspecError):
    """Two artifacts were made under different contracts; the message names the first field that differs."""


class RecallError(TaskspecError):
    """An approximate index misses the wanted recall; the message names the worst task and both numbers."""


class PlacementError(TaskspecError):
    """The cluster does not have what the job needs; the message gives both numbers."""


class TrainingError(TaskspecError):
    """Training cannot go on."""


class DivergedError(TrainingError):
    """Too many steps had a gradient that is not finite; every worker raises it at the same step."""


class RequestError(TaskspecError):
    """A request to the retriever is invalid.

    Attributes: param: the field of the request that breaks the rule.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class EndpointError(TaskspecError):
    """The endpoint refused a request, or did not answer it in time.

    Attributes: status: of the last answer, None if there was none. type, param, code, request_id: as it has them.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code, self.request_id = status, type, param, code, request_id
