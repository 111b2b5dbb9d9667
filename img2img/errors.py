"""Every error the service reports, each with one stable ``code`` a program can match on.

    Img2ImgError                      internal
    ├── InvalidRequest                invalid_request       a field breaks the contract
    │   ├── InvalidImage              invalid_image         the bytes are no picture we take
    │   └── Unsupported               unsupported           no pool here can do what the field asks for
    ├── MalformedBody                 malformed_body        the body cannot be parsed at all
    ├── MissingBody                   missing_body
    ├── RequestTooLarge               request_too_large
    ├── Unauthenticated               unauthenticated
    │   ├── MissingCredentials        missing_credentials
    │   └── AccountMismatch           account_mismatch      the key belongs to another account
    ├── NotFound                      not_found             no such route
    │   ├── JobNotFound               job_not_found
    │   └── ModelNotFound             model_not_found
    │       └── ModelNameInvalid      model_name_invalid
    ├── ResidencyConflict             residency             only pools outside could run it, and the tenant stays local
    ├── IdempotencyConflict           idempotency_conflict  same key, another body
    ├── NotReplayable                 not_replayable        the job succeeded, or its input is gone
    ├── ResultNotReady                result_not_ready
    ├── ResultGone                    result_gone           past its retention
    ├── Retryable                     -                     goes away by itself; says when to try again
    │   ├── NoCapacity                no_capacity           nobody is free right now
    │   ├── Congested                 -                     too much waits; says for how long
    │   │   ├── QueueFull             queue_full            as many jobs wait as may
    │   │   │   └── AccountQueueFull  account_queue_full    as many of this account's
    │   │   ├── DeadlineUnreachable   deadline_unreachable  the job would end `expired`
    │   │   └── SpendCapReached       spend_cap_reached     what may be spent today is spent
    │   ├── TooManyBytesInFlight      too_many_bytes_in_flight
    │   ├── Unavailable               unavailable           the queue server cannot be reached
    │   └── WaitTimeout               wait_timeout          not finished within the wait
    ├── ClientClosed                  client_closed
    ├── ConfigurationError            configuration         refused at start-up
    ├── LeaseLost                     lease_lost            a worker's claim was taken over
    └── JobError                      job_failed            why a job ended without a picture
        ├── EngineFailed              engine_failed         worth another attempt
        │   └── UpstreamFailed        upstream_failed       the service that the engine calls failed
        ├── UpstreamBusy              upstream_busy         it takes no call now; says when to try again
        ├── UpstreamRefused           upstream_refused      it takes none of ours: an account or address is wrong
        ├── UpstreamUnknown           upstream_unknown      its answer was lost; the call may have been billed
        ├── ModelRefused              model_refused         the same input fails again
        ├── UnsafeOutput              unsafe_output         the safety checker flagged the picture
        ├── InputGone                 input_gone            its input was deleted before it ran
        ├── Quarantined               quarantined           its workers died while running it
        ├── AttemptTimeout            attempt_timeout       one attempt took longer than allowed
        ├── WorkerLost                worker_lost           an attempt's worker died
        ├── JobCanceled               canceled
        └── JobExpired                expired               its deadline passed

Third-party errors are translated at the edge that meets them, ``from exc``. Each front end has one
table from class to status, and a test walks this tree to prove the tables complete.
"""

from collections.abc import Mapping
from typing import ClassVar, TypeVar

T = TypeVar("T")


class Img2ImgError(Exception):
    """Base of all errors reported to a user. ``str(error)`` is safe to show and names the remedy."""

    code: ClassVar[str] = "internal"


class InvalidRequest(Img2ImgError):
    """A field breaks the contract; ``field`` is its name in the schema ("" for the whole body)."""

    code = "invalid_request"

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


class InvalidImage(InvalidRequest):
    """The bytes of ``image`` or ``mask`` are no picture that the service takes."""

    code = "invalid_image"


class Unsupported(InvalidRequest):
    """No pool that the job could go to can do what ``field`` asks for."""

    code = "unsupported"


class MalformedBody(Img2ImgError):
    """The body is not what its form says: broken JSON, multipart or base64."""

    code = "malformed_body"


class MissingBody(Img2ImgError):
    code = "missing_body"


class RequestTooLarge(Img2ImgError):
    code = "request_too_large"


class Unauthenticated(Img2ImgError):
    """Credentials were sent and are not known."""

    code = "unauthenticated"


class MissingCredentials(Unauthenticated):
    code = "missing_credentials"


class AccountMismatch(Unauthenticated):
    code = "account_mismatch"


class NotFound(Img2ImgError):
    code = "not_found"


class JobNotFound(NotFound):
    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"No job {job_id!r} on this account: check the id, and that the key belongs to its account")


class ModelNotFound(NotFound):
    code = "model_not_found"


class ModelNameInvalid(ModelNotFound):
    code = "model_name_invalid"


class ResidencyConflict(Img2ImgError):
    """The tenant's pictures stay here, and only pools outside could make this one."""

    code = "residency"


class IdempotencyConflict(Img2ImgError):
    code = "idempotency_conflict"

    def __init__(self) -> None:
        super().__init__("This idempotency key was used with another request: send a new key, or the first body again")


class NotReplayable(Img2ImgError):
    code = "not_replayable"


class ResultNotReady(Img2ImgError):
    code = "result_not_ready"


class ResultGone(Img2ImgError):
    code = "result_gone"


class Retryable(Img2ImgError):
    """An error that goes away by itself; ``retry_after`` is the wait in seconds to advise."""

    retry_after: float = 1.0  # for those that error_of makes

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoCapacity(Retryable):
    code = "no_capacity"


class Congested(Retryable):
    """Too much waits. ``eta`` is the time in which a job queued now would be done, in seconds, where that is known."""

    eta: float | None = None  # for those that error_of makes

    def __init__(self, message: str, retry_after: float = 1.0, eta: float | None = None) -> None:
        super().__init__(message, retry_after)
        self.eta = eta


class QueueFull(Congested):
    code = "queue_full"


class AccountQueueFull(QueueFull):
    code = "account_queue_full"


class DeadlineUnreachable(Congested):
    """The job would end `expired`: sooner said than waited for."""

    code = "deadline_unreachable"


class SpendCapReached(Congested):
    """Only pools that cost money could run the job, and what may be spent on this day is spent."""

    code = "spend_cap_reached"


class TooManyBytesInFlight(Retryable):
    code = "too_many_bytes_in_flight"


class Unavailable(Retryable):
    code = "unavailable"


class WaitTimeout(Retryable):
    code = "wait_timeout"


class ClientClosed(Img2ImgError):
    code = "client_closed"


class ConfigurationError(Img2ImgError):
    code = "configuration"


class LeaseLost(Img2ImgError):
    code = "lease_lost"


class JobError(Img2ImgError):
    """Why a job ended without a picture. ``retryable`` asks for another attempt."""

    code = "job_failed"
    retryable: ClassVar[bool] = False


class EngineFailed(JobError):
    code = "engine_failed"
    retryable = True


class UpstreamFailed(EngineFailed):
    """The service that the engine calls did not make the picture; another attempt may work."""

    code = "upstream_failed"


class UpstreamBusy(JobError):
    """The upstream takes no call now. No attempt is spent: the job waits for ``retry_after`` seconds in the queue."""

    code = "upstream_busy"
    retryable = True
    retry_after: float = 1.0  # for those that error_of makes

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamRefused(JobError):
    """The upstream takes no call of ours, whatever the input: who runs the service has to mend something."""

    code = "upstream_refused"


class UpstreamUnknown(JobError):
    """A call was sent and its answer was lost: running the job again may be billed again."""

    code = "upstream_unknown"


class ModelRefused(JobError):
    code = "model_refused"


class UnsafeOutput(JobError):
    """The safety checker flagged the picture, which is neither stored nor shown."""

    code = "unsafe_output"


class InputGone(JobError):
    code = "input_gone"


class Quarantined(JobError):
    """Every worker that ran it died; a replay gives it another chance."""

    code = "quarantined"


class AttemptTimeout(JobError):
    code = "attempt_timeout"


class WorkerLost(JobError):
    code = "worker_lost"


class JobCanceled(JobError):
    code = "canceled"


class JobExpired(JobError):
    code = "expired"


def most_specific(table: Mapping[type["Img2ImgError"], T], error: "Img2ImgError | type[Img2ImgError]") -> T:
    """The entry of the error's class, or of its nearest base; a front end's table has one for the root."""
    kind = error if isinstance(error, type) else type(error)
    return next(table[base] for base in kind.__mro__ if base in table)


def error_of(code: str, message: str) -> "Img2ImgError":
    """The error that a job's recorded ``code`` stands for, for front ends that answer with it."""
    kinds: list[type[Img2ImgError]] = [Img2ImgError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    kind = next((kind for kind in kinds if kind.code == code), JobError)
    if issubclass(kind, InvalidRequest):
        return kind("", message)
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error
