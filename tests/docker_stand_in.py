"""Stands in for the program `docker`, as far as cloudbuild.yaml uses it: images are mere names.

A folder is the registry, and the machine's own images: DOCKER_STAND_IN names it. What it is asked
for is written to ``asked`` there; what it is to refuse with is read from ``refusal``.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import dockerfile


def main(arguments):
    folder = Path(os.environ["DOCKER_STAND_IN"])
    with (folder / "asked").open("a") as asked:
        asked.write(json.dumps(arguments) + "\n")
    match arguments:
        case ["manifest", "inspect", name]:
            return _inspect(folder, name)
        case ["build", *rest]:
            return _build(folder, rest)
        case ["push", "--all-tags", name]:
            images = [image for image in _read(folder / "built") if image.startswith(f"{name}:")]
            _add(folder / "pushed", images)
            return 0 if images else 1
    return 125


def _inspect(folder, name):
    if refusal := _read(folder / "refusal"):
        print(*refusal, file=sys.stderr)
        return 1
    if name in _read(folder / "pushed"):
        return 0
    print(f"no such manifest: {name}", file=sys.stderr)
    return 1


def _build(folder, arguments):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tag", action="append")
    parser.add_argument("--build-arg", action="append")
    parser.add_argument("--cache-from")
    parser.add_argument("context", type=Path)
    flags = parser.parse_args(arguments)
    steps = dockerfile.read(flags.context / "Dockerfile")
    known = {step.text.partition("=")[0] for step in steps if step.name == "ARG"}
    given = {argument.partition("=")[0] for argument in flags.build_arg}
    if not given <= known | {"BUILDKIT_INLINE_CACHE"}:
        return 1
    _add(folder / "built", flags.tag)
    return 0


def _read(path):
    return path.read_text().splitlines() if path.exists() else []


def _add(path, names):
    path.write_text("".join(f"{name}\n" for name in [*_read(path), *names]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
