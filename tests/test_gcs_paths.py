"""Names in buckets, and what is said where they cannot be used; needs no server."""

import pickle
from pathlib import PurePosixPath
from types import SimpleNamespace

import helpers
import pytest
import requests
from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError
from google.cloud.storage.exceptions import InvalidResponse
from test_services import caused

from pipeline import gcs, gcs_client, storage
from pipeline.command import InputError, UnreachableError
from pipeline.gcs import GcsPath
from pipeline.gcs_client import AbsentError, UnmetError


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("gs://bucket", "bucket", ""),
        ("gs://bucket/", "bucket", ""),
        ("gs://bucket/a", "bucket", "a"),
        ("gs://bucket/a/b/", "bucket", "a/b"),
        ("gs://my.bucket_1-x/a b/ü", "my.bucket_1-x", "a b/ü"),
    ],
)
def test_parse(text, bucket, key):
    path = gcs.parse(text)
    assert (path.bucket, path.key) == (bucket, key)
    assert str(path) == text.removesuffix("/")
    assert storage.folder(text, buckets=True) == storage.place(str(path)) == path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gs://", "expected gs://bucket/path"),
        ("gs:///a", "expected gs://bucket/path"),
        ("gs://Bucket/a", "expected gs://bucket/path"),
        ("gs://b/a", "expected gs://bucket/path"),  # a bucket's name has three characters
        ("gs://-bucket/a", "expected gs://bucket/path"),
        ("gs://bucket/a//b", "empty part"),
        ("gs://bucket//a", "empty part"),
        ("gs://bucket/a/../b", "empty part, or . or .."),
        ("gs://bucket/./b", "empty part, or . or .."),
        ("gs://bucket/a\nb", "printable text"),
        (f"gs://bucket/{'x' * 1025}", "at most 1024 bytes"),
        (f"gs://bucket/{'ü' * 513}", "at most 1024 bytes"),
    ],
)
def test_parse_refuses(text, said):
    with pytest.raises(InputError, match=said):
        storage.folder(text, buckets=True)


def test_other_schemes_are_refused():
    with pytest.raises(InputError, match="s3://b/x: expected a local folder or gs://bucket/path"):
        storage.folder("s3://b/x", buckets=True)


@pytest.mark.parametrize("key", ["a", "a/b", "a/b.tfrecord", "a.d/b.tfrecord.gz", ".a", "a."])
def test_arithmetic_is_that_of_pathlib(key):
    path, oracle = GcsPath("bucket", key), PurePosixPath("/", key)
    for mine, theirs in (
        (path, oracle),
        (path.parent, oracle.parent),
        (path / "c", oracle / "c"),
        (path.parent / "c/d", oracle.parent / "c/d"),
    ):
        assert f"/{mine.key}" == str(theirs)
        assert (mine.name, mine.suffix) == (theirs.name, theirs.suffix)
    assert (path / "c/d").relative_to(path) == "c/d"


def test_bucket_is_its_own_parent():
    bucket = gcs.parse("gs://bucket")
    assert (bucket.parent, bucket.name, bucket / "a") == (bucket, "", GcsPath("bucket", "a"))


def test_paths_are_values():
    path = gcs.parse("gs://bucket/a")
    assert pickle.loads(pickle.dumps(path)) == path
    assert len({path, GcsPath("bucket") / "a"}) == 1
    with pytest.raises(AttributeError):
        path.key = "b"


# What is said


def verify(*, before="", **env):
    script = f"{before}\nfrom pipeline import dataset\ndataset.main()"
    done = helpers.run_python("-c", script, "verify", "gs://bucket/x", env=env)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_client_is_missing():
    code, said = verify(
        before="import sys; sys.modules['google.cloud.storage'] = None",
        STORAGE_EMULATOR_HOST="http://127.0.0.1:1",
    )
    assert code == 2
    assert said.splitlines() == [
        "python -m pipeline.dataset: error: gs:// folders need a package:"
        " pip install google-cloud-storage"
    ]


def test_no_credentials(tmp_path):
    code, said = verify(
        STORAGE_EMULATOR_HOST=None,
        GOOGLE_APPLICATION_CREDENTIALS=None,
        NO_GCE_CHECK="true",
        CLOUDSDK_CONFIG=tmp_path,
    )
    assert (code, said) == (
        2,
        "python -m pipeline.dataset: error: gs:// folders need Google credentials; try:"
        " gcloud auth application-default login\n",
    )


def test_address_without_scheme():
    code, said = verify(STORAGE_EMULATOR_HOST="localhost:4443")
    assert (code, said) == (
        2,
        "python -m pipeline.dataset: error: STORAGE_EMULATOR_HOST localhost:4443:"
        " expected http://host:port\n",
    )


def test_server_is_gone():
    code, said = verify(
        before="from pipeline import gcs_client; gcs_client.RETRY_SECONDS = 0.5",
        STORAGE_EMULATOR_HOST="http://127.0.0.1:1",
    )
    assert (code, said) == (
        1,
        "python -m pipeline.dataset: error: gs://bucket/x: no answer from http://127.0.0.1:1"
        " within 0.5 seconds\n",
    )


def test_client_is_loaded_only_for_buckets(small_dataset):
    script = """
import sys
from pipeline import dataset, preprocess
from trainer import task
assert dataset.execute(("verify", [dataset.storage.folder(sys.argv[1])])) == 0
print(sorted(name for name in sys.modules if name.startswith("google.cloud.")))
"""
    done = helpers.run_python("-c", script, small_dataset)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, AbsentError), (412, UnmetError), (403, InputError), (500, UnreachableError)],
)
def test_an_answer_that_is_cut_where_it_explains_itself_is_an_answer(status, expected):
    response = SimpleNamespace(status_code=status)
    with pytest.raises(expected) as told, gcs_client.told("gs://b/x"):
        try:
            raise InvalidResponse(response, "a secret")
        except InvalidResponse:
            try:
                raise ConnectionError("cut")
            except ConnectionError:
                raise requests.exceptions.ChunkedEncodingError("a secret") from None
    assert type(told.value) is expected
    assert "secret" not in str(told.value)


def test_no_answer_at_all():
    said = "gs://b/x: no answer from Cloud Storage within 60 seconds"
    with pytest.raises(UnreachableError, match=said), gcs_client.told("gs://b/x"):
        raise requests.exceptions.ChunkedEncodingError("cut")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (caused(RefreshError("a secret"), TransportError("HTTP 503")), UnreachableError),
        (RefreshError("a secret", retryable=True), UnreachableError),
        (TransportError("a secret"), UnreachableError),
        (RefreshError("a secret"), InputError),
        (DefaultCredentialsError("a secret"), InputError),
    ],
    ids=["metadata", "retryable", "transport", "refused", "none"],
)
def test_credentials_that_come_later_are_waited_for(monkeypatch, error, expected):
    """Where the server that renews them is silent; of those that are refused it is said at once."""
    monkeypatch.setattr(gcs_client, "RETRY_SECONDS", 0.2)
    asked = []

    def ask():
        asked.append(1)
        if len(asked) == 1:
            raise error
        return "there"

    def refuse():
        raise error

    retry = gcs_client.patience()["retry"].with_delay(initial=0.001)
    if expected is UnreachableError:
        assert retry(ask)() == "there"
        assert len(asked) == 2
    for call in (refuse, retry(refuse)):
        with pytest.raises(InputError) as told, gcs_client.told("gs://b/x"):
            call()
        assert type(told.value) is expected
        assert "secret" not in str(told.value)
        assert str(told.value).startswith("gs://b/x: the Google credentials c")
