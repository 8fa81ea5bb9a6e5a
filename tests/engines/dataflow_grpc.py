"""The stand-in for Dataflow by gRPC, as the real service is asked: the same jobs in other words."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from dataflow_service import Service
from google.cloud import dataflow as api
from google.cloud.dataflow_v1beta3.services.jobs_v1_beta3 import transports as jobs
from google.cloud.dataflow_v1beta3.services.messages_v1_beta3 import transports as messages
from google.protobuf import json_format

PACKAGE = "/google.dataflow.v1beta3."
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
# Of each method: what is asked, what is answered, and the verb and the ending of its address.
METHODS = {
    "JobsV1Beta3/CreateJob": (api.CreateJobRequest, api.Job, "POST", ""),
    "JobsV1Beta3/ListJobs": (api.ListJobsRequest, api.ListJobsResponse, "GET", ""),
    "JobsV1Beta3/GetJob": (api.GetJobRequest, api.Job, "GET", "/{id}"),
    "JobsV1Beta3/UpdateJob": (api.UpdateJobRequest, api.Job, "PUT", "/{id}"),
    "MessagesV1Beta3/ListJobMessages": (
        *(api.ListJobMessagesRequest, api.ListJobMessagesResponse, "GET", "/{id}/messages"),
    ),
}


class Methods(grpc.GenericRpcHandler):
    """Asks a `Service` what it is asked, in its own words."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        asked, answered, verb, ending = METHODS[details.method.removeprefix(PACKAGE)]

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            place = f"/v1b3/projects/{request.project_id}/locations/{request.location}/jobs"
            path = place + ending.format(id=getattr(request, "job_id", ""))
            body = "{}" if verb == "GET" else json_format.MessageToJson(api.Job.pb(request.job))
            query = {"name": getattr(request, "name", ""), "pageToken": _token(request)}
            given = {name: [value] for name, value in query.items() if value}
            service = self._service
            with service._lock:
                service.requests.append((verb, path))
                code, content = service._handle(verb, path, body.encode(), given)
            if service.losing and verb == "POST":
                context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
            if code != 200:
                context.abort(STATUS[code], content["error"]["message"])
            return json_format.Parse(json.dumps(content), answered.pb(answered()))

        serialize: Callable[[Any], bytes] = lambda message: message.SerializeToString()  # noqa: E731
        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=asked.deserialize, response_serializer=serialize
        )


def _token(request: Any) -> str:
    return str(getattr(request, "page_token", ""))


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """Serves inside; yields host and port."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, handlers=[Methods(service)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def connect(client: Any, address: str) -> None:
    """Lets a client of ours ask by gRPC, as it does where no endpoint is named."""
    channel = grpc.insecure_channel(address)
    of_jobs = jobs.JobsV1Beta3GrpcTransport(channel=channel)
    of_messages = messages.MessagesV1Beta3GrpcTransport(channel=channel)
    client._jobs_client = api.JobsV1Beta3Client(transport=of_jobs)
    client._messages_client = api.MessagesV1Beta3Client(transport=of_messages)
