"""The job service of Vertex AI, as far as it is needed, and plain in what it says.

Its client, of google-cloud-aiplatform, takes seconds to load: here, where it is first used.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from pipeline import services
from pipeline.command import FAILED, InputError
from pipeline.redaction import one_line
from pipeline.vertex_options import ATTEMPT_LABEL, RUN_LABEL, VertexConfig

REQUEST_SECONDS = 60.0  # that one may take
NEEDS_EXTRA = "training on Vertex AI needs the cloud extra: pip install 'digits-pipeline[cloud]'"
SERVICE, ROLE = "Vertex AI", "Vertex AI User"

SUCCEEDED = "SUCCEEDED"
FAILED_STATE = "FAILED"
CANCELLED = "CANCELLED"
CANCELLING = "CANCELLING"
ENDED = (SUCCEEDED, FAILED_STATE, CANCELLED, "EXPIRED", "PARTIALLY_SUCCEEDED")


class JobError(InputError):
    """The job came to no good end, or to none that is known."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the service knows of a custom job.

    Attributes:
        name: of the resource: ``projects/P/locations/R/customJobs/NUMBER``.
        display_name: for people.
        state: without its prefix: ``RUNNING``.
        attempt: of the run; what our label says.
        created: when.
        error: why it failed, in one line, if it has.
        error_code: of google.rpc.Code.
    """

    name: str
    display_name: str
    state: str
    attempt: str
    created: datetime.datetime
    error: str = ""
    error_code: int = 0

    @property
    def is_over(self) -> bool:
        """Whether its state is the last one."""
        return self.state in ENDED


class Service:
    """The custom jobs of one project in one region.

    All methods raise `services.NoAnswerError` where asking again may help, and
    `services.RefusedError` where not.
    """

    def __init__(self, config: VertexConfig) -> None:
        self._parent = config.parent
        self._client = _connect(config)

    def create(self, request: Mapping[str, Any]) -> Job:
        """Makes a job of a request, as `vertex_job.request` gives it.

        Raises:
            services.QuotaError: the project may not have as much.
        """
        from google.cloud.aiplatform_v1.types import CustomJob

        with told():
            job = CustomJob.from_json(json.dumps(request["customJob"]))
            made = self._client.create_custom_job(
                parent=request["parent"], custom_job=job, timeout=REQUEST_SECONDS
            )
        return as_job(made)

    def get(self, name: str) -> Job:
        """How a job stands."""
        with told():
            return as_job(self._client.get_custom_job(name=name, timeout=REQUEST_SECONDS))

    def unfinished(self, run_label: str) -> list[Job]:
        """The jobs of a run that have not ended, the oldest first."""
        asked = {"parent": self._parent, "filter": f'labels.{RUN_LABEL}="{run_label}"'}
        with told():
            pages = self._client.list_custom_jobs(request=asked, timeout=REQUEST_SECONDS)
            found = [as_job(job) for job in pages]
        return sorted(
            (job for job in found if not job.is_over), key=lambda job: (job.created, job.name)
        )

    def cancel(self, name: str) -> None:
        """Asks for the end of a job; it comes later."""
        with told():
            self._client.cancel_custom_job(name=name, timeout=REQUEST_SECONDS)


def as_job(job: Any) -> Job:
    """A `CustomJob` message as ours."""
    # A state that this client does not know yet is a mere number, and no end.
    state = getattr(job.state, "name", "JOB_STATE_UNSPECIFIED")
    return Job(
        name=job.name,
        display_name=job.display_name,
        state=state.removeprefix("JOB_STATE_"),
        attempt=job.labels.get(ATTEMPT_LABEL, ""),
        created=job.create_time or datetime.datetime.now(datetime.UTC),
        error=one_line(job.error.message),
        error_code=job.error.code,
    )


def require_extra() -> None:
    """Makes sure that the client is installed, without loading it.

    Raises:
        InputError: it is not.
    """
    try:
        found = importlib.util.find_spec("google.cloud.aiplatform_v1")
    except ImportError:  # of a package above it
        found = None
    if found is None:
        raise InputError(NEEDS_EXTRA)


def _connect(config: VertexConfig) -> Any:
    """The client. A plain http endpoint, which is a stand-in, is sent no credentials.

    It speaks JSON over HTTP, which passes proxies as all else here does.
    """
    require_extra()
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1 import JobServiceClient

    endpoint = config.endpoint or f"https://{config.region}-aiplatform.googleapis.com"
    credentials = AnonymousCredentials() if endpoint.startswith("http:") else None
    with told():
        return JobServiceClient(
            credentials=credentials,
            transport="rest",
            client_options={"api_endpoint": endpoint},
        )


def told() -> AbstractContextManager[None]:
    """`services.told` of this service."""
    return services.told(SERVICE, ROLE)
