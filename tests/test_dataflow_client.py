"""Dataflow's client before a stand-in for the service; `test_dataflow_jobs.py` runs whole jobs."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import test_gcs  # noqa: F401 - finds what stands in
from apache_beam.options.pipeline_options import PipelineOptions
from dataflow_service import Script, Service

from pipeline import dataflow_follow, dataflow_notes
from pipeline.command import FailedError, LockedError, UnreachableError
from pipeline.services import RefusedError

pytestmark = pytest.mark.cloud

JOB = "2026-11-20_03_00_00-{}"
FIRST = JOB.format(1)
ASKED = dataflow_notes.Note(
    project="my-project-1", region="r", name="a", request_id="id-1", identity="same"
)
NOTE = dataclasses.replace(ASKED, job_id=FIRST)


@pytest.fixture
def service():
    pytest.importorskip("google.cloud.dataflow", reason="needs the cloud extra")
    with Service().running() as service:
        yield service


@pytest.fixture(params=["http", "grpc"])
def client(service, monkeypatch, request):
    """By http as the other tests ask, and by gRPC as the real service is asked."""
    import dataflow_grpc

    from pipeline import dataflow_client  # of the cloud extra

    monkeypatch.setattr(dataflow_follow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dataflow_client, "MESSAGES_SECONDS", 0.1)
    monkeypatch.setattr(dataflow_client, "SUBMIT_SECONDS", 0.3)
    place = ("--project=my-project-1", "--region=r", "--temp_location=gs://bucket/temp")
    client = dataflow_client.Client(
        PipelineOptions([f"--dataflow_endpoint={service.endpoint}", "--no_auth", *place])
    )
    if request.param == "http":
        yield client
        return
    with dataflow_grpc.running(service) as address:
        dataflow_grpc.connect(client, address)
        yield client


def submit(service, *states, name="a", request="id-1"):
    """Makes a job that goes through these states."""
    service.script = Script(states=states)
    body = f'{{"name": "{name}", "clientRequestId": "{request}"}}'
    assert service._create("my-project-1", "r", body.encode())[0] == 200


def request_of(note):
    """What is sent for a job, as far as it counts here."""
    from google.cloud import dataflow as api

    proto = api.Job(name=note.name, client_request_id=note.request_id)
    return SimpleNamespace(proto=proto)


def verbs(service):
    return [method for method, _ in service.requests]


@pytest.mark.parametrize("code", [404, 403, 503])
def test_a_job_whose_messages_are_refused_is_followed_to_its_end(service, client, caplog, code):
    submit(service, "RUNNING", "RUNNING", "RUNNING", "DONE")
    handle = service._handle

    def refuse(method, path, *rest):
        if path.endswith("/messages"):
            return code, {"error": {"code": code, "message": "no right to see them"}}
        return handle(method, path, *rest)

    service._handle = refuse
    with caplog.at_level(logging.INFO, "digits_pipeline"):
        assert dataflow_follow.follow(client, NOTE) == ("JOB_STATE_DONE", "")
    assert service.only.asked >= 4
    asked = [path for _, path in service.requests if path.endswith("/messages")]
    assert len(asked) >= 4
    assert caplog.text.count(f"what Dataflow says of job {FIRST} is not known") == 1
    assert "no right to see them" in caplog.text


# A request whose answer is lost


def test_a_request_that_was_heard_makes_one_job(service, client):
    service.losing = True
    assert client.create(request_of(ASKED), ASKED) == FIRST
    assert len(service.jobs) == 1
    assert verbs(service) == ["POST", "GET", "GET"]  # the list, and the job that it names


def test_one_that_was_not_heard_is_made_again(service, client, monkeypatch):
    from pipeline import dataflow_client

    monkeypatch.setattr(dataflow_client, "SUBMIT_SECONDS", 5.0)
    service.failing = [503]
    assert client.create(request_of(ASKED), ASKED) == FIRST
    assert verbs(service) == ["POST", "GET", "POST"]


def test_a_conflict_with_our_own_request_is_none(service, client, monkeypatch):
    """It was heard late: after the list had been asked for, and before it was made again."""
    from pipeline import dataflow_client

    monkeypatch.setattr(dataflow_client, "SUBMIT_SECONDS", 5.0)
    create = service._create

    def late(*request):
        service._create = create
        create(*request)
        service.refused = (409, "There is already an active job named a.")
        return 503, {"error": {"code": 503, "message": "later"}}

    def nothing_yet(*_):
        service._list = listed
        return 200, {"jobs": []}

    listed = service._list
    service._create, service._list = late, nothing_yet
    assert client.create(request_of(ASKED), ASKED) == FIRST
    assert len(service.jobs) == 1
    assert verbs(service) == ["POST", "GET", "POST", "GET", "GET"]


def test_a_conflict_with_another_job_is_told(service, client):
    submit(service, "RUNNING", request="id-2")
    with pytest.raises(LockedError, match="a job named a is at work in my-project-1, r; try again"):
        client.create(request_of(ASKED), ASKED)
    assert verbs(service) == ["POST"]


def test_a_job_of_the_same_name_that_is_told_instead_of_ours(service, client):
    service._create = lambda *_: (200, {"id": "other", "clientRequestId": "id-2"})
    with pytest.raises(LockedError, match="a job named a is at work in my-project-1, r; try again"):
        client.create(request_of(ASKED), ASKED)


def test_a_refusal_is_wrong_input(service, client):
    service.refused = (400, "no such machine")
    with pytest.raises(RefusedError, match=r"refuses it \(HTTP 400\): no such machine") as caught:
        client.create(request_of(ASKED), ASKED)
    assert caught.value.exit_code == 2


def test_a_service_that_neither_answers_nor_lists(service, client):
    service.failing = [503] * 100
    with pytest.raises(UnreachableError, match=r"no answer from Dataflow for 0\.3 seconds"):
        client.create(request_of(ASKED), ASKED)


def test_no_right_to_list_leaves_it_open_whether_there_is_a_job(service, client):
    service.losing = True
    service._list = lambda *_: (403, {"error": {"code": 403, "message": "not you"}})
    with pytest.raises(FailedError, match=r"^job a: Dataflow: access denied \(HTTP 403\): not you"):
        client.create(request_of(ASKED), ASKED)
    assert len(service.jobs) == 1


# A job by its name


def test_ours_is_found_among_all_of_its_name(service, client):
    for number in range(5):  # more than a page of the list
        submit(service, "DONE", request=f"id-{number}")
    submit(service, "RUNNING", name="b", request="id-9")
    assert client.find(ASKED) == JOB.format(2)
    assert client.find(dataclasses.replace(ASKED, request_id="id-4")) == JOB.format(5)
    assert client.find(dataclasses.replace(ASKED, request_id="id-5")) == ""
    assert client.find(dataclasses.replace(ASKED, request_id="id-9")) == ""
    assert client.find(dataclasses.replace(ASKED, name="c")) == ""


def test_another_ones_at_work_is_not_ours(service, client):
    submit(service, "RUNNING", request="id-2")
    assert client.find(ASKED) == ""


@pytest.mark.parametrize(("state", "found"), [("RUNNING", JOB.format(2)), ("DONE", "")])
def test_where_no_request_is_told_the_one_at_work_is_ours(service, client, state, found):
    submit(service, "DONE", request="id-0")
    submit(service, state)
    service.forgets_requests = True
    assert client.find(ASKED) == found


def test_a_job_that_the_service_has_forgotten(client):
    assert client.state(NOTE, forgotten="JOB_STATE_FAILED") == "JOB_STATE_FAILED"


def test_a_job_that_was_just_made_may_not_be_known_yet(service, client):
    submit(service, "RUNNING", "DONE")
    running = service.jobs.pop(FIRST)
    handle = service._handle

    def known_later(*request):
        answer = handle(*request)
        service.jobs[FIRST] = running
        return answer

    service._handle = known_later
    assert client.get(NOTE).state == "JOB_STATE_RUNNING"
    assert verbs(service) == ["GET", "GET"]


def test_a_state_that_is_not_known_yet_is_no_end(service, client, monkeypatch, caplog):
    from google.cloud import dataflow as api

    submit(service, "RUNNING")
    states = [api.Job(current_state=number) for number in (99, api.JobState.JOB_STATE_DONE)]
    monkeypatch.setattr(client._jobs_client, "get_job", lambda **_: states.pop(0))
    with caplog.at_level(logging.INFO, "digits_pipeline"):
        assert dataflow_follow.follow(client, NOTE)[0] == dataflow_follow.DONE
    assert f"-  {NOTE} is unknown" in caplog.messages
    states.append(api.Job(current_state=99))
    assert client.state(NOTE, forgotten="") == "JOB_STATE_UNKNOWN"
