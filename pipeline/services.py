"""Google's services: what an answer comes to, and asking until there is one.

Their clients take long to load; what is needed of them is imported where it is used.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from pipeline.command import InputError, UnreachableError, log
from pipeline.redaction import one_line

FIRST_SECONDS = 1.0  # the first pause between two questions; each is longer than the one before
GROWTH = 1.5
LONGEST_SECONDS = 30.0
CREDENTIALS = "try: gcloud auth application-default login"

T = TypeVar("T")
P = ParamSpec("P")


class NoAnswerError(Exception):
    """No answer came, or one that may be another the next time; the message says which."""


class QuotaError(NoAnswerError):
    """The project may not have as much, or may not ask as often; the message is the service's."""


class RefusedError(InputError):
    """The service does not do what it is asked for, whenever it is asked.

    Attributes:
        code: of HTTP; 0: it was not asked, for want of credentials.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Asking:
    """Asks a service until it answers; between two questions it waits, longer each time.

    Attributes:
        service: its name.
        patience: how long it goes on where no answer comes, in seconds.
        longest: of its pauses, in seconds.
    """

    def __init__(self, service: str, *, patience: float, longest: float = LONGEST_SECONDS) -> None:
        self.service = service
        self.patience = patience
        self.longest = longest
        self._silent_since: float | None = None
        self._pause = FIRST_SECONDS

    def begin(self) -> None:
        """The next pause is the first one again."""
        self._pause = FIRST_SECONDS

    def wait(self, most: float = float("inf")) -> None:
        """Pauses."""
        time.sleep(min(self._pause, self.longest, most))
        self._pause *= GROWTH

    def unanswered(self, error: NoAnswerError) -> None:
        """Waits until it is worth asking again.

        Raises:
            UnreachableError: no answer has come for too long.
        """
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
            self.begin()
            log.info(
                "no answer from %s (%s); asking on for %g s", self.service, error, self.patience
            )
        left = self._silent_since + self.patience - now
        if left <= 0:
            raise UnreachableError(
                f"no answer from {self.service} for {self.patience:g} seconds ({error}); a job that"
                " is at work goes on there, and the same command finds it"
            )
        self.wait(left)

    def until_answered(self, ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Asks until there is an answer."""
        while True:
            try:
                answer = ask(*args, **kwargs)
            except NoAnswerError as error:
                self.unanswered(error)
            else:
                if self._silent_since is not None:
                    self._silent_since = None
                    self.begin()
                return answer


def is_unrenewed(error: object) -> bool:
    """Whether credentials could not be renewed for want of an answer, which may come next time.

    On machines of Google's the server that is asked for them is beside the machine; an error of it
    arrives as the cause of one that elsewhere speaks of the credentials.
    """
    from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError

    if isinstance(error, RefreshError) and isinstance(error.__cause__, TransportError):
        return True
    return isinstance(error, TransportError) or (
        isinstance(error, GoogleAuthError) and bool(error.retryable)
    )


@contextlib.contextmanager
def told(service: str, role: str) -> Iterator[None]:
    """Says in one line why what is asked of a service inside fails.

    Args:
        service: its name.
        role: what an account needs that may ask.

    Raises:
        NoAnswerError: no answer, or one that may be another next time.
        QuotaError: too much was asked for.
        RefusedError: what is asked for is wrong, or the credentials are.
    """
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.protobuf.json_format import ParseError

    try:
        yield
    except exceptions.TooManyRequests as error:
        raise QuotaError(said(error)) from None
    except exceptions.GoogleAPICallError as error:
        code = int(error.code or 0)
        if code in (0, 408) or code >= 500 or isinstance(error, exceptions.Aborted):
            raise NoAnswerError(f"HTTP {code}: {said(error)}" if code else said(error)) from None
        if code in (401, 403):
            raise RefusedError(
                f"{service}: access denied (HTTP {code}): {said(error)}; expected the role {role},"
                " and the API enabled",
                code,
            ) from None
        raise RefusedError(f"{service} refuses it (HTTP {code}): {said(error)}", code) from None
    except GoogleAuthError as error:  # what it says may hold what belongs in no log
        if is_unrenewed(error):
            raise NoAnswerError(
                f"the credentials could not be renewed: {type(error).__name__}"
            ) from None
        raise RefusedError(
            f"the Google credentials cannot be used ({type(error).__name__}); {CREDENTIALS}"
        ) from None
    except (
        *(exceptions.RetryError, ParseError, requests.RequestException),
        *(ConnectionError, TimeoutError),
    ) as error:
        raise NoAnswerError(type(error).__name__) from None


def said(error: Any) -> str:
    """What a service says of an error, without the request that it repeats."""
    return one_line(re.sub(r"^[A-Z]+ https?://\S+: ", "", str(error.message)))
