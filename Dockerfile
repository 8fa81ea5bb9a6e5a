# The whole job in one image, its packages in the versions of constraints.txt: the trainer, and the
# worker that Dataflow and Beam's other runners start. The entrypoint is that worker's, as they ask
# for; for anything else, name the program:
#     docker run --rm --entrypoint python IMAGE -m pipeline.retrain --help
# For training on GPUs:
#     docker build --build-arg EXTRAS=report,cloud,gpu .
# The base images are named by tags, and not by digests: what they bring of the system, and Python's
# patch release, may be newer in a later build.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 1000 job
COPY --from=beam /opt/apache/beam /opt/apache/beam
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# What the job needs comes before its code, and depends on nothing of it but the version: a change
# of the code makes none of this large layer anew.
ARG EXTRAS=report,cloud
WORKDIR /build
COPY constraints.txt setup.py ./
COPY pipeline/__init__.py pipeline/
RUN mkdir pipeline/sources trainer \
    && pip install --constraint constraints.txt setuptools \
    && pip install --constraint constraints.txt --no-build-isolation ".[${EXTRAS}]" \
    && pip uninstall --yes digits-pipeline \
    && rm -rf build ./*.egg-info

COPY pipeline pipeline
COPY trainer trainer
RUN pip install --no-deps --no-build-isolation . \
    && pip check \
    && rm -rf ./*

# The worker takes the packages as they are: an environment of its own would need root. Homes may be
# anybody's (Cloud Build puts its own in their place), so that caches lie elsewhere. The last three
# are how a container finds the driver of a GPU; without one they change nothing.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TFDS_DATA_DIR=/tmp/tensorflow_datasets \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
USER 1000
WORKDIR /home/job
HEALTHCHECK --interval=5m --timeout=30s CMD ["python", "-m", "pipeline.retrain", "--version"]
ENTRYPOINT ["/opt/apache/beam/boot"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="digits-pipeline" \
      org.opencontainers.image.description="From images of digits to a served model" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"
