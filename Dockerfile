# Images of spq-serve for linux/amd64: `docker build -t spq-serve .` for NVIDIA GPUs, `--target cpu` for CPUs.
#
# Python 3.11 is what the tests run on. The base is plain Debian with Python for both: torch's wheels bring the CUDA
# libraries, so a CUDA base image would hold them a second time. To pin it to the byte: PYTHON_IMAGE=...@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm


# --- to build: a compiler, and an environment with all but torch, whose files are checked against the lock ---
FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    TORCH=/opt/venv/lib/python3.11/site-packages/torch
# The compiler stays in this stage, so any version that Debian 12 has will do.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY requirements.lock ./
RUN python -m pip --python /opt/venv/bin/python install --no-deps --require-hashes -r requirements.lock


# --- this project, under /app as it will lie in the image: a layer of its own, so that a change of code ships little ---
FROM build AS app
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY kernels kernels
COPY server server
COPY spq spq
# The extensions are optional for pip; an image without them would be several times slower, so here they are not.
RUN python -m pip --python /opt/venv/bin/python install --no-deps --no-build-isolation --root /app . \
    && test -n "$(find /app -name '_avx2*.so')" && test -n "$(find /app -name '_avx512*.so')"


# --- torch for CPUs: on PyTorch's own index, not on PyPI, and therefore pinned by version and local part, without a
# hash. pip checks the download against the hash that the index states. TORCH_INDEX= (empty) asks pip's own settings.
# Its tests and C++ headers, a tenth of the image, are of no use to a server. ---
FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip --python /opt/venv/bin/python install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        torch==2.13.0+cpu \
    && rm -rf "$TORCH/test" "$TORCH/include"


# --- torch for GPUs, the CUDA libraries and triton, checked against their lock ---
FROM build AS build-cuda
COPY requirements-cuda.lock ./
RUN python -m pip --python /opt/venv/bin/python install --no-deps --require-hashes -r requirements-cuda.lock \
    && rm -rf "$TORCH/test" "$TORCH/include"
# Triton compiles one C module when it first sees a GPU. It is compiled here, so that the image needs no compiler.
COPY deploy/triton_module.py deploy/prebuilt_cc.sh ./
RUN /opt/venv/bin/python triton_module.py /opt/triton && install -m 755 prebuilt_cc.sh /opt/triton/cc


# --- what both images are, without their packages ---
FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="spq-serve" \
      org.opencontainers.image.description="OpenAI-compatible server for LLaMA models compressed with SPQ" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin spq \
    && install -d -o spq -g spq /cache /models
COPY deploy/healthcheck.py /opt/spq/
COPY demo/calibration.txt /opt/spq/demo/
COPY demo/storyteller /opt/spq/demo/storyteller
# Every option of the server is a variable (README, Options). Without a model the demo model is served.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    SPQ_CACHE_DIR=/cache/spq-serve \
    SPQ_CALIBRATION=/opt/spq/demo/calibration.txt \
    SPQ_MODEL=/opt/spq/demo/storyteller \
    SPQ_HOST=0.0.0.0 \
    SPQ_PORT=8000
# All that is ever written is /cache and /tmp: `--read-only --tmpfs /tmp` works.
VOLUME ["/cache"]
WORKDIR /cache
USER 10001:10001
EXPOSE 8000
# The first start compresses the model, which may take long: until /ready answers, failures do not count for an hour.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h --retries=3 CMD ["python", "/opt/spq/healthcheck.py"]
# The server is process 1 and drains on SIGTERM. It leaves no orphans for an init (tini) to reap: all it ever starts are
# Triton's assembler runs, which it waits for.
STOPSIGNAL SIGTERM
ENTRYPOINT ["spq-serve"]


FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=app /app/opt/venv /opt/venv


FROM runtime AS cuda
# TRITON_LIBCUDA_PATH spares Triton the look for a library to link with: the module above is linked already.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_LIBCUDA_PATH=/usr/lib/x86_64-linux-gnu \
    CC=/opt/triton/cc
COPY --from=build-cuda /opt/triton /opt/triton
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=app /app/opt/venv /opt/venv
