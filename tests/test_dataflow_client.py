"""Dataflow's client before a stand-in for the service; `test_dataflow_jobs.py` runs whole jobs."""

import logging

import pytest
import test_gcs  # noqa: F401 - finds what stands in
from apache_beam.options.pipeline_options import PipelineOptions
from dataflow_service import Script, Service

from pipeline import dataflow

pytestmark = pytest.mark.cloud

JOB = "2026-11-20_03_00_00-1"
NOTE = dataflow.Note(project="my-project-1", region="r", job_id=JOB, identity="same")


@pytest.fixture
def service():
    pytest.importorskip("google.cloud.dataflow", reason="needs the cloud extra")
    with Service().running() as service:
        yield service


@pytest.fixture
def client(service, monkeypatch):
    from pipeline import dataflow_client  # of the cloud extra

    monkeypatch.setattr(dataflow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dataflow_client, "MESSAGES_SECONDS", 0.1)
    place = ("--project=my-project-1", "--region=r", "--temp_location=gs://bucket/temp")
    return dataflow_client.Client(
        PipelineOptions([f"--dataflow_endpoint={service.endpoint}", "--no_auth", *place])
    )


def submit(service, *states):
    service.script = Script(states=states)
    body = b'{"name": "a", "clientRequestId": "id-1"}'
    assert service._create("my-project-1", "r", body)[0] == 200


@pytest.mark.parametrize("code", [404, 403, 503])
def test_a_job_whose_messages_are_refused_is_followed_to_its_end(service, client, caplog, code):
    submit(service, "RUNNING", "RUNNING", "RUNNING", "DONE")
    handle = service._handle

    def refuse(method, path, body):
        if path.endswith("/messages"):
            return code, {"error": {"code": code, "message": "no right to see them"}}
        return handle(method, path, body)

    service._handle = refuse
    with caplog.at_level(logging.INFO, "digits_pipeline"):
        assert dataflow.follow(client, NOTE) == ("JOB_STATE_DONE", "")
    assert service.only.asked >= 4
    asked = [path for _, path in service.requests if path.endswith("/messages")]
    assert len(asked) >= 4
    assert caplog.text.count(f"what Dataflow says of job {JOB} is not known") == 1
    assert "no right to see them" in caplog.text or code == 503


def test_errors_are_told_without_secrets(client):
    from google.api_core import exceptions

    from pipeline import dataflow_client

    error = exceptions.Forbidden("Authorization: Bearer ya29.SECRET")
    assert dataflow_client.told(error) == "HTTP 403: Authorization: (left out)"
