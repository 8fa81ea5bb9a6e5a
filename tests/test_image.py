"""What the Dockerfile says; `make lint` reads it too, and test_cloudbuild.py runs its commands."""

import re

import dockerfile
import helpers
import pytest

import pipeline

STEPS = dockerfile.read(helpers.ROOT / "Dockerfile")


def of(name):
    return [step.text for step in STEPS if step.name == name]


def pinned(package):
    """The version that constraints.txt gives a package."""
    text = (helpers.ROOT / "constraints.txt").read_text()
    return re.search(rf"^{package}==(.+)$", text, re.MULTILINE)[1]


def test_reading_a_dockerfile(tmp_path):
    (tmp_path / "Dockerfile").write_text(
        '# a remark\nFROM a AS b\nRUN one \\\n    && two\n# another\nENV A=1 \\\n    B="2 3"\n'
        'ENTRYPOINT ["x", "y z"]\n'
    )
    first, run, env, entry = dockerfile.read(tmp_path / "Dockerfile")
    assert (first.name, first.text) == ("FROM", "a AS b")
    assert run.text == "one && two"
    assert env.settings() == {"A": "1", "B": "2 3"}
    assert entry.words() == ["x", "y z"]


def test_beam_and_python_are_those_of_the_lock_file():
    worker, base = of("FROM")
    found = re.fullmatch(r"apache/beam_python(\d\.\d+)_sdk:(\S+) AS beam", worker)
    assert found[2] == pinned("apache-beam")
    assert re.fullmatch(rf"python:{re.escape(found[1])}-slim-\w+", base)
    assert f'python_requires=">={found[1]},<' in (helpers.ROOT / "setup.py").read_text()
    assert (
        "COPY --from=beam /opt/apache/beam /opt/apache/beam"
        in (helpers.ROOT / "Dockerfile").read_text().splitlines()
    )


def test_the_worker_of_beam_is_the_entrypoint_and_needs_no_root():
    names = [step.name for step in STEPS]
    assert of("ENTRYPOINT") == ['["/opt/apache/beam/boot"]']
    (user,) = of("USER")
    assert int(user) > 0
    assert f"--uid {user} " in " ".join(of("RUN"))
    assert "RUN" not in names[names.index("USER") :]
    # Without it, the worker makes an environment in a folder that is root's.
    environment = {key: value for step in STEPS if step.name == "ENV"
                   for key, value in step.settings().items()}  # fmt: skip
    assert environment["RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT"] == "1"


def test_what_its_programs_write_they_write_where_their_user_may():
    """Beam's worker program in the folder it is started in, libraries where ENV says."""
    at = [step.name for step in STEPS].index("USER")
    (home,) = re.findall(r"useradd --create-home --uid \d+ (\w+)", " ".join(of("RUN")))
    assert [step.text for step in STEPS[at:] if step.name == "WORKDIR"] == [f"/home/{home}"]
    (environment,) = [step.settings() for step in STEPS[:at] if "TFDS_DATA_DIR=" in step.text]
    folders = {name for name, value in environment.items() if value.startswith("/")}
    assert folders == {"MPLCONFIGDIR", "TFDS_DATA_DIR", "LD_LIBRARY_PATH"}
    written = folders - {"LD_LIBRARY_PATH"}  # which is read
    assert all(environment[name].startswith("/tmp/") for name in written)


def test_a_change_of_code_leaves_the_layer_of_dependencies_alone():
    """What is copied before it are three small files, none of them with code of a stage."""
    (installs,) = [
        at for at, step in enumerate(STEPS) if step.name == "RUN" and "--constraint" in step.text
    ]
    copied = [step.words()[:-1] for step in STEPS[:installs] if step.name == "COPY"]
    assert copied[1:] == [["constraints.txt", "setup.py"], ["pipeline/__init__.py"]]
    later = [step.text for step in STEPS[installs + 1 :] if step.name == "RUN"]
    assert all("--no-deps" in text for text in later)


def test_what_goes_to_the_build_is_the_code_alone():
    code = [
        str(path.relative_to(helpers.ROOT))
        for package in ("pipeline", "trainer")
        for path in (helpers.ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    expected = sorted(["constraints.txt", "setup.py", *code])
    assert sorted(dockerfile.let_through(helpers.ROOT)) == expected


def test_labels():
    (labels,) = [step.settings() for step in STEPS if step.name == "LABEL"]
    prefix = "org.opencontainers.image."
    assert all(name.startswith(prefix) for name in labels)
    assert labels[f"{prefix}version"] == pipeline.__version__
    assert labels[f"{prefix}base.name"] == f"docker.io/library/{of('FROM')[-1]}"
    assert labels[f"{prefix}revision"] == "${REVISION}"


def test_the_health_check_is_a_command_that_answers():
    (check,) = of("HEALTHCHECK")
    program, *arguments = dockerfile.Instruction("CMD", check.partition(" CMD ")[2]).words()
    assert program == "python"
    done = helpers.run_python(*arguments)
    assert (done.returncode, done.stdout) == (0, f"pipeline.retrain {pipeline.__version__}\n")


@pytest.mark.parametrize("extras", ["report,cloud", "report,cloud,gpu"])
def test_extras_are_those_of_the_package(extras):
    text = (helpers.ROOT / "Dockerfile").read_text()
    assert f"EXTRAS={extras}" in text
    known = re.findall(r'^    "(\w+)": \[', (helpers.ROOT / "setup.py").read_text(), re.MULTILINE)
    assert set(extras.split(",")) <= set(known)
