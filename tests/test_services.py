"""Google's services: what an answer comes to, by either transport, and asking for one."""

import grpc
import pytest
import requests
from google.api_core import exceptions
from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError
from google.protobuf.json_format import ParseError

from pipeline import services
from pipeline.command import UNREACHABLE, InputError, UnreachableError
from pipeline.services import Asking, NoAnswerError, QuotaError, RefusedError


def caused(error, cause):
    error.__cause__ = cause
    return error


def told(error):
    """What becomes of an error: its kind, what it says, its code of HTTP."""
    with pytest.raises((NoAnswerError, RefusedError)) as caught, services.told("It", "Its User"):
        raise error
    return type(caught.value), str(caught.value), getattr(caught.value, "code", None)


@pytest.mark.parametrize(
    ("http", "status", "kind", "said"),
    [
        (400, grpc.StatusCode.INVALID_ARGUMENT, RefusedError, "It refuses it (HTTP 400): no"),
        (403, grpc.StatusCode.PERMISSION_DENIED, RefusedError, "It: access denied (HTTP 403): no"),
        (401, grpc.StatusCode.UNAUTHENTICATED, RefusedError, "It: access denied (HTTP 401): no"),
        (404, grpc.StatusCode.NOT_FOUND, RefusedError, "It refuses it (HTTP 404): no"),
        (409, grpc.StatusCode.ALREADY_EXISTS, RefusedError, "It refuses it (HTTP 409): no"),
        (429, grpc.StatusCode.RESOURCE_EXHAUSTED, QuotaError, "no"),
        (500, grpc.StatusCode.INTERNAL, NoAnswerError, "HTTP 500: no"),
        (503, grpc.StatusCode.UNAVAILABLE, NoAnswerError, "HTTP 503: no"),
        (504, grpc.StatusCode.DEADLINE_EXCEEDED, NoAnswerError, "HTTP 504: no"),
        (502, None, NoAnswerError, "HTTP 502: no"),
        (408, None, NoAnswerError, "HTTP 408: no"),
    ],
)
def test_answers_come_to_the_same_by_http_and_by_grpc(http, status, kind, said):
    errors = [exceptions.from_http_status(http, "no")]
    if status is not None:
        errors.append(exceptions.from_grpc_status(status, "no"))
    if http in (401, 403):
        said += "; expected the role Its User, and the API enabled"
    code = http if kind is RefusedError else None
    assert [told(error) for error in errors] == [(kind, said, code)] * len(errors)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        # As http has no status of their own, gRPC alone tells these.
        (exceptions.Aborted("later"), NoAnswerError, "HTTP 409: later"),
        (exceptions.GoogleAPICallError("lost"), NoAnswerError, "lost"),
        (exceptions.RetryError("x", None), NoAnswerError, "RetryError"),
        (requests.ConnectionError("token=SECRET"), NoAnswerError, "ConnectionError"),
        (requests.exceptions.ChunkedEncodingError("x"), NoAnswerError, "ChunkedEncodingError"),
        (ConnectionResetError("x"), NoAnswerError, "ConnectionResetError"),
        (TimeoutError("x"), NoAnswerError, "TimeoutError"),
        (ParseError("{"), NoAnswerError, "ParseError"),
        (
            TransportError("token=SECRET"),
            NoAnswerError,
            "the credentials could not be renewed: TransportError",
        ),
        (
            # Of a machine of Google's, whose metadata server has a moment's trouble.
            caused(RefreshError("token=SECRET"), TransportError("HTTP 503")),
            NoAnswerError,
            "the credentials could not be renewed: RefreshError",
        ),
        (
            RefreshError("token=SECRET", retryable=True),
            NoAnswerError,
            "the credentials could not be renewed: RefreshError",
        ),
        (
            caused(RefreshError("token=SECRET"), ValueError("of the key")),
            RefusedError,
            "the Google credentials cannot be used (RefreshError); try: gcloud auth"
            " application-default login",
        ),
        (
            RefreshError("token=SECRET"),
            RefusedError,
            "the Google credentials cannot be used (RefreshError); try: gcloud auth"
            " application-default login",
        ),
        (
            DefaultCredentialsError("/home/me/key.json"),
            RefusedError,
            "the Google credentials cannot be used (DefaultCredentialsError); try: gcloud auth"
            " application-default login",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_comes_of_other_errors(error, kind, said):
    assert told(error)[:2] == (kind, said)


def test_what_is_said_holds_neither_the_request_nor_secrets():
    error = exceptions.Forbidden("POST http://h:1/v1/jobs?key=a: Authorization: Bearer ya29.SECRET")
    assert told(error)[1].startswith("It: access denied (HTTP 403): Authorization: (left out);")


def test_errors_of_ours_pass():
    with pytest.raises(InputError, match=r"^ours$"), services.told("It", "Its User"):
        raise InputError("ours")


@pytest.fixture
def naps(monkeypatch):
    """How long was slept; time passes in no other way."""
    naps = []
    monkeypatch.setattr(services.time, "sleep", naps.append)
    monkeypatch.setattr(services.time, "monotonic", lambda: sum(naps))
    return naps


def answers(*given):
    """Gives an answer after the other, the last for ever; raises those that are errors."""
    left = list(given)

    def ask():
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


def test_it_asks_with_pauses_that_grow_until_there_is_an_answer(naps, caplog):
    caplog.set_level("INFO", "digits_pipeline")
    asking = Asking("It", patience=100.0, longest=3.0)
    silence = NoAnswerError("HTTP 503")
    assert asking.until_answered(answers(*[silence] * 5, "there")) == "there"
    assert naps == [1.0, 1.5, 2.25, 3.0, 3.0]
    assert caplog.messages == ["no answer from It (HTTP 503); asking on for 100 s"]
    naps.clear()
    assert asking.until_answered(answers(silence, "again")) == "again"
    assert naps == [1.0]


def test_it_gives_up_when_its_patience_is_at_an_end_and_asks_once_more_then(naps):
    asked = []
    asking = Asking("It", patience=4.0)

    def ask():
        asked.append(sum(naps))
        raise NoAnswerError("HTTP 502")

    said = (
        r"^no answer from It for 4 seconds \(HTTP 502\); a job that is at work goes on there, and"
        " the same command finds it$"
    )
    with pytest.raises(UnreachableError, match=said) as caught:
        asking.until_answered(ask)
    assert caught.value.exit_code == UNREACHABLE
    assert asked == [0.0, 1.0, 2.5, 4.0]


def test_between_two_answers_it_waits_longer_each_time(naps):
    asking = Asking("It", patience=1.0, longest=2.0)
    for _ in range(4):
        asking.wait()
    asking.begin()
    asking.wait()
    assert naps == [1.0, 1.5, 2.0, 2.0, 1.0]
