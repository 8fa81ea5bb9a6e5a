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

from pipeline.command import InputError

EMULATOR = "STORAGE_EMULATOR_HOST"
RETRY_SECONDS = 60.0  # after which a server that does not answer is given up
TIMEOUT_SECONDS = 60.0  # of one request


class AbsentError(Exception):
    """There is no such object, or no such bucket."""


class UnmetError(Exception):
    """A precondition of a change does not hold."""


def bucket(name: str) -> Any:
    """A bucket, without asking whether it exists."""
    return _client(os.getpid(), os.environ.get(EMULATOR)).bucket(name)


def patience() -> dict[str, Any]:
    """How long a request may take and be tried again, as its arguments."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    retry = DEFAULT_RETRY.with_timeout(RETRY_SECONDS).with_delay(initial=0.25, maximum=8.0)
    return {"retry": retry, "timeout": TIMEOUT_SECONDS}


@functools.lru_cache(maxsize=1)
def _client(process: int, emulator: str | None) -> Any:
    """The client of this process: one that was made before a fork would share its connections."""
    if emulator and not emulator.startswith(("http://", "https://")):
        raise InputError(f"{EMULATOR} {emulator}: expected http://host:port")
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
        InputError: the server refused or did not answer, or the client or its credentials are
            missing.
    """
    try:
        import requests
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption
    except ImportError:
        raise InputError("gs:// folders need a package: pip install google-cloud-storage") from None
    try:
        yield
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
        raise InputError(f"{path}: the server answered HTTP {error.code}") from None
    except DataCorruption:
        raise InputError(f"{path}: arrives with another checksum than it has there") from None
    except GoogleAuthError as error:
        raise InputError(
            f"{path}: the Google credentials cannot be used ({type(error).__name__});"
            " try: gcloud auth application-default login"
        ) from None
    except (exceptions.RetryError, requests.RequestException, ConnectionError, TimeoutError):
        raise InputError(
            f"{path}: no answer from {os.environ.get(EMULATOR) or 'Cloud Storage'} within"
            f" {RETRY_SECONDS:g} seconds"
        ) from None
