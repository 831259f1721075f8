# What sends the load and writes the report: loadtest/ with locust and matplotlib. No torch, no model code.
# Build from the repository's root: docker build -f deploy/loadtest.Dockerfile -t spq-loadtest .
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}
ENV PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib HOME=/tmp
COPY requirements-loadtest.lock /opt/loadtest/
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes \
        -r /opt/loadtest/requirements-loadtest.lock
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/loadtest
COPY loadtest loadtest
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin loadtest
USER 10001:10001
# The web page of locust; `python -m loadtest.compare ...` takes its place for a comparison.
EXPOSE 8089
CMD ["locust", "-f", "loadtest/locustfile.py"]
