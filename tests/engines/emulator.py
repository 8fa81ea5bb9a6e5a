"""Runs fake-gcs-server in the foreground: a Cloud Storage in memory, with empty buckets.

python tests/engines/emulator.py [BUCKET ...]

It listens where ``STORAGE_EMULATOR_HOST`` points, by default at http://127.0.0.1:4443, and the
job uses it where that variable is set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import install

VARIABLE = "STORAGE_EMULATOR_HOST"
DEFAULT = "http://127.0.0.1:4443"


def command(address: str, buckets: Path) -> list[str]:
    """The command line of a server at ``http://host:port``; each folder in `buckets` is one."""
    parts = urlsplit(address)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ValueError(f"{VARIABLE} {address}: expected http://host:port")
    where = ("-scheme", "http", "-host", parts.hostname, "-port", str(parts.port))
    return [str(install.EMULATOR), "-backend", "memory", *where, "-data", str(buckets)]


def main(names: list[str]) -> int:
    """Becomes the server, or returns an exit code."""
    address = os.environ.get(VARIABLE) or DEFAULT
    buckets = install.ENGINES / "buckets"
    for name in names:
        (buckets / name).mkdir(parents=True, exist_ok=True)
    try:
        program, *arguments = command(address, buckets)
        print(f"export {VARIABLE}={address}", flush=True)
        os.execv(program, [program, *arguments])
    except (OSError, ValueError) as error:
        print(f"emulator.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
