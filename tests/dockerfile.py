"""Reads a Dockerfile, and runs its RUN steps where there is no Docker.

A fresh virtual environment stands for the Python of the base image, and an empty folder for the
root of the image: WORKDIR is a folder inside, COPY brings what .dockerignore lets through. Every
command comes from the file itself.
"""

import dataclasses
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    def words(self):
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)

    def settings(self):
        """{name: value} of an ENV or LABEL."""
        return dict(word.split("=", 1) for word in self.words())


def read(path):
    """The instructions of a Dockerfile: without comments, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def expand(text, variables):
    return VARIABLE.sub(lambda match: variables[match[1] or match[2]], text)


def let_through(context):
    """The files of a build context that .dockerignore lets through, as relative names.

    Knows what ours is made of: ``*``, ``!name`` of a file or folder, and ``**/name``.
    """
    lines = (context / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    return [
        str(path.relative_to(context))
        for path in sorted(context.rglob("*"))
        if path.is_file() and _taken(path.relative_to(context), rules)
    ]


def _taken(name, rules):
    heads = [name, *name.parents][:-1]
    taken = True
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        named = [head.name if rule.startswith("**/") else str(head) for head in heads]
        if any(fnmatch.fnmatch(text, pattern) for text in named):
            taken = rule.startswith("!")
    return taken


class Image:
    """What comes of the last stage of a Dockerfile, as far as it can be had without Docker.

    Attributes:
        root: the folder that stands for ``/``.
        python: the interpreter that stands for the image's.
        environment: what ENV has set.
        user: whom USER names.
        noted: the commands that were noted down instead of run, as they ask for more than a folder.
    """

    def __init__(self, folder, *, noted=(), unset=()):
        self.root = folder / "root"
        self.python = folder / "venv/bin/python"
        self.environment = {}
        self.user = "root"
        self._directory = self.root
        self._unset = unset
        self._log = folder / "noted"
        self._shims = folder / "shims"
        self.root.mkdir(parents=True)
        self._shims.mkdir()
        self._log.touch()
        for name in noted:
            self.shim(name, f'echo "{name} $*" >> "{self._log}"')
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    def shim(self, name, script):
        """Puts a program of this name before all others."""
        (self._shims / name).write_text(f"#!/bin/sh\n{script}\n")
        (self._shims / name).chmod(0o755)

    @property
    def noted(self):
        return self._log.read_text().splitlines()

    def build(self, instructions, context, **arguments):
        """Carries out the last stage, with these build arguments."""
        start = max(at for at, step in enumerate(instructions) if step.name == "FROM")
        for step in instructions[start + 1 :]:
            variables = self.environment | arguments
            match step.name:
                case "ARG":
                    name, _, default = step.text.partition("=")
                    arguments.setdefault(name, default)
                case "ENV":
                    for name, value in step.settings().items():
                        if name not in self._unset:
                            self.environment[name] = expand(value, variables)
                case "WORKDIR":
                    self._directory = self.root / step.text.lstrip("/")
                    self._directory.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(context, *step.words())
                case "RUN":
                    self.run(["sh", "-c", step.text], env=arguments)
                case "USER":
                    self.user = step.text

    def _copy(self, context, *words):
        *sources, target = words
        if sources[0].startswith("--from="):  # of an image that cannot be had here
            return
        here = let_through(context)
        for source in sources:
            files = [name for name in here if name == source or name.startswith(f"{source}/")]
            assert files, f"COPY {source}: .dockerignore lets nothing of it through"
            for name in files:
                inside = Path(name).relative_to(source)
                to = self._directory / target / (inside if inside.parts else Path(name).name)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(context / name, to)

    def run(self, command, *, env=None, check=True, cwd=None):
        """Runs a command as in the image, nothing of the host's Python in its way."""
        host = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
        }
        path = f"{self._shims}:{self.python.parent}:{os.environ['PATH']}"
        return subprocess.run(
            command,
            env=host | self.environment | (env or {}) | {"PATH": path},
            cwd=cwd or self._directory,
            capture_output=True,
            text=True,
            check=check,
        )
