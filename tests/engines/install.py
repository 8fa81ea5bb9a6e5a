"""Installs under ``.engines/`` what tests need that is not Python.

python tests/engines/install.py [prism] [flink] [emulator]

Prism and fake-gcs-server, a Cloud Storage in memory, are built from their Go sources, and the
Flink job server is put together from Beam's modules on Maven Central, so nothing comes from
anywhere but a package registry. What is already there is left as it is; delete the folder to
start again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENGINES = HERE.parent.parent / ".engines"
PRISM = ENGINES / "prism"
PRISM_MODULE = "github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0"
EMULATOR = ENGINES / "fake-gcs-server"
EMULATOR_MODULE = "github.com/fsouza/fake-gcs-server@v1.56.1"
FLINK_JARS = ENGINES / "flink"
FLINK_JOB_SERVER = ENGINES / "flink-job-server.jar"
FLINK_VERSION = "1.19"
FLINK_MAIN = "org.apache.beam.runners.flink.FlinkJobServerDriver"
MANIFEST_LINE = 70  # a jar's manifest wraps its lines at 72 bytes


def main(names: list[str]) -> int:
    """Installs the named engines, by default all; returns an exit code."""
    installers = {"prism": install_prism, "flink": install_flink, "emulator": install_emulator}
    try:
        if unknown := set(names) - installers.keys():
            raise LookupError(f"no engine {unknown.pop()}; expected {' or '.join(installers)}")
        for name in names or installers:
            installers[name]()
    except (LookupError, subprocess.CalledProcessError) as error:
        print(f"install.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def install_prism() -> None:
    """Builds Beam's runner in Go."""
    _build(PRISM, PRISM_MODULE)


def install_emulator() -> None:
    """Builds the server that stands for Cloud Storage."""
    _build(EMULATOR, EMULATOR_MODULE)


def _build(program: Path, module: str) -> None:
    """Builds a Go program; the first time takes some minutes."""
    if program.exists():
        return
    _require("go", f"{program.name} is built with Go: https://go.dev/dl")
    print(f"building {program.name}", flush=True)
    building = ENGINES / f"{program.name}.incomplete"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    _run("go", "install", module, env={"GOBIN": str(building)})
    (building / program.name).rename(program)
    building.rmdir()


def install_flink() -> None:
    """Fetches the modules of the job server, and writes a jar that starts it from them."""
    if FLINK_JOB_SERVER.exists():
        return
    _require("java", "Flink 1.19 runs on Java 11 and 17")
    _require("mvn", "the modules of the Flink job server come through Maven")
    print("fetching the Flink job server", flush=True)
    shutil.rmtree(FLINK_JARS, ignore_errors=True)
    goal = ("dependency:copy-dependencies", f"-DoutputDirectory={FLINK_JARS}")
    _run("mvn", "-B", "-q", "-f", str(HERE / "pom.xml"), *goal)
    incomplete = FLINK_JOB_SERVER.with_suffix(".incomplete")
    with zipfile.ZipFile(incomplete, "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", _jar_manifest(sorted(FLINK_JARS.glob("*.jar"))))
    incomplete.rename(FLINK_JOB_SERVER)


def _jar_manifest(jars: list[Path]) -> str:
    """A manifest that names a main class, and where its classes are, beside the jar itself."""
    path = "Class-Path: " + " ".join(f"{jar.parent.name}/{jar.name}" for jar in jars)
    wrapped = [path[at : at + MANIFEST_LINE] for at in range(0, len(path), MANIFEST_LINE)]
    return "\r\n".join(
        ["Manifest-Version: 1.0", f"Main-Class: {FLINK_MAIN}", "\r\n ".join(wrapped), "", ""]
    )


def _require(program: str, why: str) -> None:
    if shutil.which(program) is None:
        raise LookupError(f"{program} is not installed; {why}")


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, env=os.environ | (env or {}), check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
