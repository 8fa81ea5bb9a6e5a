"""The client of Cloud Storage: one for each process, patient, and plain in what it says.

``STORAGE_EMULATOR_HOST`` (``http://host:port``) names another server, which asks for no
credentials.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from pipeline import services
from pipeline.command import InputError, UnreachableError

EMULATOR = "STORAGE_EMULATOR_HOST"
NO_BUCKET_LOOKUP = "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"
RETRY_SECONDS = 60.0  # after which a server that does not answer is given up
TIMEOUT_SECONDS = 60.0  # of one request


class AbsentError(Exception):
    """There is no such object, or no such bucket."""


class UnmetError(Exception):
    """A precondition of a change does not hold."""


def bucket(name: str) -> Any:
    """A bucket, without asking whether it exists."""
    return _client(os.getpid(), os.environ.get(EMULATOR)).bucket(name)


def patience(seconds: float | None = None) -> dict[str, Any]:
    """How long a request may take and be tried again, as its arguments.

    Args:
        seconds: at most, each; where less is wanted than the usual.
    """
    from google.cloud.storage.retry import DEFAULT_RETRY

    limit = float("inf") if seconds is None else seconds
    is_passing = DEFAULT_RETRY._predicate
    retry = DEFAULT_RETRY.with_timeout(min(limit, RETRY_SECONDS)).with_predicate(
        lambda error: services.is_unrenewed(error) or is_passing(error)
    )
    return {
        "retry": retry.with_delay(initial=0.25, maximum=8.0),
        "timeout": min(limit, TIMEOUT_SECONDS),
    }


@functools.lru_cache(maxsize=1)
def _client(process: int, emulator: str | None) -> Any:
    """The client of this process: one that was made before a fork would share its connections."""
    if emulator and not emulator.startswith(("http://", "https://")):
        raise InputError(f"{EMULATOR} {emulator}: expected http://host:port")
    # Unasked, the client looks up a bucket's place for its traces, which takes a right of its own.
    os.environ.setdefault(NO_BUCKET_LOOKUP, "true")
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client(project=None)  # objects belong to a bucket, not to a project
    except DefaultCredentialsError:
        raise InputError(
            "gs:// folders need Google credentials; try: gcloud auth application-default login"
        ) from None


@contextlib.contextmanager
def told(path: object) -> Iterator[None]:
    """Says in one line why what is asked of the server inside fails.

    What the errors say of themselves is left out: it may hold what belongs in no log.

    Raises:
        AbsentError: there is no such object or bucket.
        UnmetError: a precondition does not hold.
        UnreachableError: the server did not answer, or not as it should.
        InputError: the server refused, or the client or its credentials are missing.
    """
    try:
        import requests
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    except ImportError:
        raise InputError("gs:// folders need a package: pip install google-cloud-storage") from None
    try:
        try:
            yield
        except requests.RequestException as error:
            # Its answer may have come, and have been cut where it explains itself.
            answered: BaseException | None = error
            while answered is not None and not isinstance(answered, InvalidResponse):
                answered = answered.__context__
            if answered is None:
                raise
            raise exceptions.from_http_status(answered.response.status_code, "") from None
    except exceptions.NotFound:
        raise AbsentError from None
    except exceptions.PreconditionFailed:
        raise UnmetError from None
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise InputError(
            f"{path}: access denied (HTTP {error.code}); expected the right to read and write"
            " objects in this bucket"
        ) from None
    except exceptions.GoogleAPICallError as error:
        raise UnreachableError(f"{path}: the server answered HTTP {error.code}") from None
    except DataCorruption:
        raise UnreachableError(f"{path}: arrives with another checksum than it has there") from None
    except GoogleAuthError as error:
        if services.is_unrenewed(error):
            raise UnreachableError(_unrenewed(path)) from None
        raise InputError(
            f"{path}: the Google credentials cannot be used ({type(error).__name__});"
            " try: gcloud auth application-default login"
        ) from None
    except (
        exceptions.RetryError,
        requests.RequestException,
        ConnectionError,
        TimeoutError,
    ) as error:
        if services.is_unrenewed(getattr(error, "cause", None)):
            raise UnreachableError(_unrenewed(path)) from None
        raise UnreachableError(
            f"{path}: no answer from {os.environ.get(EMULATOR) or 'Cloud Storage'} within"
            f" {RETRY_SECONDS:g} seconds"
        ) from None


def _unrenewed(path: object) -> str:
    return f"{path}: the Google credentials could not be renewed; no answer to the request for them"
