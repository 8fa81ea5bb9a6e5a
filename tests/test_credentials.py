"""The chain with credentials that a server asks for, and repeats as it fails: none are found again.

Before fake-gcs-server, which asks for none, stands a server that hands out a token for the key of a
service account, and lets nobody pass without it.
"""

import contextlib
import http.client
import http.server
import json
import os
import threading
import urllib.parse
import urllib.request

import helpers
import pytest
import test_gcs
from test_silent_server import PATIENCE
from test_vertex import SECRET, fake_account

from pipeline import registry
from pipeline.gcs import GcsPath

pytestmark = pytest.mark.cloud

TOKEN = "ya29.c29tZS10b2tlbi1vZi1ub2JvZHk"
BY_HAND = "ya29.YW5vdGhlci1vZi10aGUtZW52aXJvbm1lbnQ"
ROOT = GcsPath(test_gcs.BUCKET, "asked/root")
FLAGS = (
    f"--root={ROOT}", "--source=digits", "--num_shards=2", "--hidden_units=16", "--epochs=2",
    "--min_accuracy=0", "--min_class_accuracy=0", "--checkpoint_seconds=0", "--window=w",
    "--verbosity=1",
)  # fmt: skip
HOP_BY_HOP = ("connection", "content-length", "date", "server", "transfer-encoding")


class Gate(http.server.ThreadingHTTPServer):
    """Hands out a token, and passes on what comes with it, but for what is to fail.

    Attributes:
        fails: (a word, a status): an upload whose path or content has this word is answered so.
        assertions: by which tokens were asked for.
        passed: paths of requests that were passed on.
        refused: without the token.
        echoed: answers that repeated it.
    """

    daemon_threads = True

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.fails: tuple[str, int] | None = None
        self.assertions, self.passed, self.refused, self.echoed = [], [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def running(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        gate = self.server
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/token":
            asked = urllib.parse.parse_qs(content.decode())
            gate.assertions += asked["assertion"]
            granted = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            self.answer(200, json.dumps(granted).encode())
            return
        given = self.headers.get("Authorization")
        if given != f"Bearer {TOKEN}":
            gate.refused += 1
            self.answer(401, b"{}")
            return
        word, status = gate.fails or ("", 0)
        said = urllib.parse.unquote(self.path).encode() + content
        if word and self.command == "POST" and word.encode() in said:
            gate.echoed += 1
            message = f"not with Authorization: {given} of {SECRET}"
            errors = [{"message": message, "reason": "x"}]
            body = {"error": {"code": status, "message": message, "errors": errors}}
            self.answer(status, json.dumps(body).encode())
            return
        gate.passed.append(self.path)
        self.pass_on(content)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def pass_on(self, content):
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, content, headers)
        answer = connection.getresponse()
        self.answer(answer.status, answer.read(), answer.getheaders())
        connection.close()

    def answer(self, status, content, headers=(("Content-Type", "application/json"),)):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def gate(tmp_path):
    folder = tmp_path / "bucket"
    folder.mkdir()
    with (
        test_gcs.server(folder),
        Gate(os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://")).running() as gate,
    ):
        yield gate


@pytest.fixture
def environ(gate, tmp_path):
    """Variables of processes that have credentials, and write where they are searched."""
    keys, site, written = (tmp_path / name for name in ("keys", "site", "written"))
    for folder in (keys, site, written, written / "tmp"):
        folder.mkdir()
    account, _, _ = fake_account(keys)
    content = json.loads(account.read_text()) | {"token_uri": f"{gate.url}/token"}
    account.write_text(json.dumps(content))
    (site / "sitecustomize.py").write_text(PATIENCE)
    return {
        "PYTHONPATH": os.pathsep.join([str(site), str(helpers.ROOT)]),
        "STORAGE_EMULATOR_HOST": None,
        "API_ENDPOINT_OVERRIDE": gate.url,
        "GOOGLE_APPLICATION_CREDENTIALS": account,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": BY_HAND,
        "HTTPS_PROXY": "http://127.0.0.1:9",  # nobody listens: they are for no other server
        "NO_PROXY": "127.0.0.1",
        "HOME": written,
        "TMPDIR": written / "tmp",
        "DIGITS_CACHE_DIR": written / "cache",
    }


def test_none_are_found_again(gate, environ, tmp_path):
    said = []

    def retrain(code, fails=None):
        gate.fails = fails
        done = helpers.run_cli("pipeline.retrain", *FLAGS, env=environ, timeout=900)
        said.append(done.stdout + done.stderr)
        assert done.returncode == code, said[-1]
        assert "Traceback" not in said[-1]

    retrain(1, (".ckpt", 403))
    assert ": access denied (HTTP 403); expected the right to read and write" in said[-1]
    assert ": trainer.task ended with exit code 1; there is no champion yet; " in said[-1]
    retrain(1, (".report.incomplete", 503))
    assert ": no answer from Cloud Storage within 0.3 seconds" in said[-1]
    assert "once the server answers or has room, the same command goes on from here" in said[-1]
    echoed = gate.echoed
    assert echoed >= 2
    retrain(0)
    assert registry.champion(ROOT).version == 1  # by what the server holds, asked directly
    assert (gate.refused, gate.echoed) == (0, echoed)
    assert len(gate.passed) > 100
    of_objects = ("/storage/v1/b/digits/o", "/upload/storage/v1/b/digits/o", "/download/storage/")
    assert [path for path in gate.passed if not path.startswith(of_objects)] == []  # no other right

    account = json.loads((tmp_path / "keys" / "account.json").read_text())
    secrets = [SECRET, TOKEN, BY_HAND, *account["private_key"].splitlines()[1:-1]]
    for assertion in gate.assertions:
        secrets += assertion.split(".")[1:]  # its first part says how it is signed
    assert len(secrets) == 3 + 26 + 2 * len(gate.assertions) > 3 + 26
    bucket = GcsPath(test_gcs.BUCKET)
    objects = {f"{bucket}/{name}": (bucket / name).read_bytes() for name in bucket.walk()}
    address = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/{test_gcs.BUCKET}/o"
    listing = urllib.request.urlopen(address).read()  # with what is noted of each
    assert f"{ROOT}/models/champion.json" in objects and listing.count(b'"name"') == len(objects)
    files = helpers.tree(tmp_path / "written")
    assert any(name.endswith("train-00000-of-00002.tfrecord") for name in files)
    names = "\n".join([*objects, *files])
    texts = [text.encode() for text in [*said, names]]
    texts += [listing, *objects.values(), *files.values()]
    assert [each for each in secrets if any(each.encode() in text for text in texts)] == []
