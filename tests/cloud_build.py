"""A build of Cloud Build on this machine: what its substitutions come to, and its steps in order.

A step's image is for a test to stand in for: it gives the environment and the folder in which the
step's own command is run, as it stands in the file.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import yaml

# A name, alone or in braces; two dollars are one, for the shell.
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)\}|(\w+))")
OF_A_BUILD = ("PROJECT_ID", "BUILD_ID", "PROJECT_NUMBER", "LOCATION")
OF_A_TRIGGER = ("COMMIT_SHA", "SHORT_SHA", "BRANCH_NAME", "REPO_NAME", "TRIGGER_NAME", "TAG_NAME")


def load(path):
    """The file as it stands."""
    return yaml.safe_load(path.read_text())


def names_in(value):
    """The substitutions that a part of the file names."""
    if isinstance(value, dict):
        return set().union(*map(names_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(names_in, value))
    if not isinstance(value, str):
        return set()
    return {match[2] or match[3] for match in VARIABLE.finditer(value) if not match[1]}


def substitute(value, values):
    """A part of the file with its substitutions filled in; a name without a value is an error."""
    if isinstance(value, dict):
        return {key: substitute(part, values) for key, part in value.items()}
    if isinstance(value, list):
        return [substitute(part, values) for part in value]
    if not isinstance(value, str):
        return value
    return VARIABLE.sub(
        lambda match: "$" if match[1] else substitute(values[match[2] or match[3]], values), value
    )


def in_order(steps):
    """The steps, each after those that it waits for, else in the file's order."""
    left, done = list(steps), []
    while left:
        ready = next(
            step for step in left if {"-", *(one["id"] for one in done)} >= set(step["waitFor"])
        )
        left.remove(ready)
        done.append(ready)
    return done


def seconds(text):
    assert re.fullmatch(r"\d+s", text), text
    return int(text[:-1])


@dataclasses.dataclass(frozen=True)
class Container:
    """What stands in for a step's image.

    Attributes:
        environment: of its commands.
        folder: where they start, unless the step says where: there `home` is.
        home: the folder that stands for the step's own.
    """

    environment: dict
    folder: object
    home: object = None


def run(step, container):
    """Runs a step, its substitutions filled in; returns the process as it ended."""
    named = dict(setting.split("=", 1) for setting in step.get("env", ()))
    return subprocess.run(
        [step["entrypoint"], *step["args"]],
        env=container.environment | named,
        cwd=container.home if "dir" in step else container.folder,
        capture_output=True,
        text=True,
        check=False,
    )


def arguments(step, folder):
    """Runs a step that starts Python alone, beside a stand-in for it; returns what it was told."""
    program = folder / "python"
    program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    done = run(step, Container({"PATH": f"{folder}:{os.environ['PATH']}"}, folder, folder))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\0")[:-1]


def fails_the_build(step, code):
    return code != 0 and code not in step.get("allowExitCodes", ())


class Machine:
    """What Cloud Build's machines have: a checkout, and an image for each step.

    Attributes:
        images: the folder of the registry's stand-in.
        workspace: the checkout.
        environment: further variables of every step.
    """

    def __init__(self, folder, image, image_name, environment):
        self.images = folder / "images"
        self.workspace = folder / "workspace"
        self.environment = environment
        self._folder, self._image, self._image_name = folder, image, image_name
        self.images.mkdir()
        tools = folder / "tools"
        tools.mkdir()
        program = tools / "docker"
        stand_in = helpers.ROOT / "tests/docker_stand_in.py"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
        program.chmod(0o755)
        self._path = f"{tools}:{os.environ['PATH']}"

    def check_out(self):
        """A fresh workspace: the files, and an environment in which all is installed."""
        shutil.rmtree(self.workspace, ignore_errors=True)
        for name in helpers.source_files():
            (self.workspace / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(helpers.ROOT / name, self.workspace / name)
        venv = self.workspace / ".venv"
        venv.mkdir()
        for path in Path(sys.prefix).iterdir():
            if path.name != "bin":
                (venv / path.name).symlink_to(path)
        (venv / "bin").mkdir()
        for path in (Path(sys.prefix) / "bin").iterdir():
            (venv / "bin" / path.name).symlink_to(path)
        pip = venv / "bin/pip"  # which would put a copy of the files in that environment
        pip.unlink(missing_ok=True)
        pip.write_text("#!/bin/sh\n")
        pip.chmod(0o755)
        (venv / ".installed").unlink(missing_ok=True)
        (venv / ".installed").touch()  # after the copies, so that make installs nothing

    def container(self, name):
        """What stands in for an image."""
        host = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        if name == self._image_name:
            path = f"{self._image.python.parent}:{os.environ['PATH']}"
            host = {key: value for key, value in host.items() if not key.startswith("PYTHON")}
            home = self._folder / "home"
            home.mkdir(exist_ok=True)
            return Container(
                host | self._image.environment | self.environment | {"PATH": path},
                self.workspace,
                home,
            )
        assert name in ("python:3.11", "golang:1.26", "gcr.io/cloud-builders/docker")
        own = {"PATH": self._path, "DOCKER_STAND_IN": str(self.images)}
        return Container(host | self.environment | own, self.workspace)

    def build(self, content, values):
        """Checks out, and runs every step; returns {id: process}, up to one that fails."""
        self.check_out()
        filled = substitute(content, values)
        done = {}
        for step in in_order(filled["steps"]):
            done[step["id"]] = run(step, self.container(step["name"]))
            if fails_the_build(step, done[step["id"]].returncode):
                break
        return done

    def asked(self):
        """What docker was asked for since the last time."""
        path = self.images / "asked"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("")
        return lines
