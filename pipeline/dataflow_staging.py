"""What a job on Dataflow needs, brought to where its workers find it.

Loaded only where the cloud extra is installed.
"""

from __future__ import annotations

import copy
import hashlib
import io
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.runners.dataflow.internal.apiclient import DataflowApplicationClient

from pipeline import storage


class Staging(DataflowApplicationClient):
    """Beam's own client, whose files are uploaded as all others of ours are."""

    def stage_file_with_retry(
        self,
        gcs_or_local_path: str,
        file_name: str,
        stream_or_path: str | io.IOBase,
        mime_type: str = "",
        total_size: int | None = None,
    ) -> None:
        """Beam's place for it: uploads a file, checked by its checksum."""
        content = _content(stream_or_path)
        storage.write_atomic(storage.place(gcs_or_local_path) / file_name, content)


class Unsent(Staging):
    """Notes what would be staged, and asks nobody: not for credentials either.

    Attributes:
        staged: the files.
    """

    def __init__(self, options: PipelineOptions) -> None:
        anonymous = copy.deepcopy(options)
        anonymous.view_as(GoogleCloudOptions).no_auth = True
        super().__init__(anonymous)
        self._enable_caching = False
        self.staged: list[dict[str, Any]] = []

    def stage_file_with_retry(
        self,
        gcs_or_local_path: str,
        file_name: str,
        stream_or_path: str | io.IOBase,
        mime_type: str = "",
        total_size: int | None = None,
    ) -> None:
        """Notes a file."""
        content = _content(stream_or_path)
        self.staged.append(
            {
                "file": f"{gcs_or_local_path}/{file_name}",
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )


def _content(stream_or_path: str | io.IOBase) -> bytes:
    """What Beam gives to be staged: a file's content by its name, or a stream's."""
    if isinstance(stream_or_path, str):
        return Path(stream_or_path).read_bytes()
    content: bytes = stream_or_path.read()
    return content
