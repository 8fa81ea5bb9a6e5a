# The job in one image: the same pinned versions as `make setup`.
FROM python:3.11-slim

WORKDIR /app
COPY constraints.txt setup.py pyproject.toml ./
COPY pipeline ./pipeline
COPY trainer ./trainer
RUN pip install --no-cache-dir --constraint constraints.txt setuptools \
    && pip install --no-cache-dir --constraint constraints.txt --no-build-isolation '.[report,cloud]' \
    && useradd --create-home job
USER job
WORKDIR /home/job
ENTRYPOINT ["python", "-m"]
CMD ["pipeline.retrain", "--help"]
