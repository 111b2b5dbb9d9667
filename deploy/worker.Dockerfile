# syntax=docker/dockerfile:1
# Workers, by --target: `cuda` (the default) and `cpu` run the diffusion engine, `proxy` calls another service and has
# no torch and no model. From the repository's root:
#   docker build -f deploy/worker.Dockerfile --target cpu -t img2img-worker:cpu .

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
# "@sha256:…" holds the base to one build of that tag; without it the tag's security updates come along.
ARG PYTHON_DIGEST=""

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS base

# Our own code as a wheel, with no part of the gateway.
FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY img2img img2img
COPY worker worker
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip wheel --no-deps --wheel-dir /dist .

# Virtual environments. What the code needs comes before the code, whose changes leave those layers alone: an empty
# package stands in for it, since pip installs the requirements of a package, not those of a pyproject.toml.
FROM base AS proxy-build
WORKDIR /src
COPY pyproject.toml requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir img2img && touch README.md img2img/__init__.py \
    && python3 -m venv --without-pip /venv \
    && python3 -m pip --python /venv/bin/python install --constraint requirements.lock ".[worker]"

# torch comes first and from its own index, so that nothing else picks a build.
FROM proxy-build AS cpu-build
ARG CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /venv/bin/python install --index-url "${CPU_TORCH_INDEX}" "$(grep '^torch==' requirements.lock)" \
    && python3 -m pip --python /venv/bin/python install --constraint requirements.lock ".[worker,diffusion]"

# The default index has torch with CUDA's libraries: the host brings nothing but its driver.
FROM proxy-build AS cuda-build
ARG CUDA_TORCH_INDEX=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /venv/bin/python install --index-url "${CUDA_TORCH_INDEX}" "$(grep '^torch==' requirements.lock)" \
    && python3 -m pip --python /venv/bin/python install --constraint requirements.lock ".[worker,diffusion]"

FROM proxy-build AS proxy-venv
COPY --from=wheel /dist /dist
RUN python3 -m pip --python /venv/bin/python install --no-deps --force-reinstall /dist/*.whl \
    && rm -rf /venv/lib/python3*/site-packages/worker/models \
    && python3 -m pip --python /venv/bin/python freeze > /venv/packages.txt

FROM cpu-build AS cpu-venv
COPY --from=wheel /dist /dist
RUN python3 -m pip --python /venv/bin/python install --no-deps --force-reinstall /dist/*.whl \
    && python3 -m pip --python /venv/bin/python freeze > /venv/packages.txt

FROM cuda-build AS cuda-venv
COPY --from=wheel /dist /dist
RUN python3 -m pip --python /venv/bin/python install --no-deps --force-reinstall /dist/*.whl \
    && python3 -m pip --python /venv/bin/python freeze > /venv/packages.txt

FROM base AS worker
# As process 1 Python would not heed a signal that it has not asked for; tini passes them on, and reaps.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 img2img \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin img2img \
    && install -d -o 10001 -g 10001 /cache
COPY deploy/healthcheck.py /usr/local/lib/img2img/healthcheck.py
# The root may be read-only: nothing is written but below /tmp and /cache, where models of the hub are kept.
ENV PATH=/venv/bin:$PATH \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
WORKDIR /cache
USER 10001:10001
EXPOSE 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "/usr/local/lib/img2img/healthcheck.py", "worker"]
ENTRYPOINT ["tini", "--", "img2img"]
CMD ["worker"]

FROM worker AS proxy
COPY --from=proxy-venv /venv /venv
ENV IMG2IMG_ENGINE=cloudflare
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="img2img-worker (proxy)" \
      org.opencontainers.image.description="Worker of img2img that has another service make the pictures" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      img2img.packages="/venv/packages.txt"

FROM worker AS cpu
COPY --from=cpu-venv /venv /venv
ENV IMG2IMG_DEVICE=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="img2img-worker (cpu)" \
      org.opencontainers.image.description="Worker of img2img that runs diffusion models on a CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      img2img.packages="/venv/packages.txt"

FROM worker AS cuda
USER 0:0
# torch.compile (IMG2IMG_COMPILE) builds what launches its kernels with a C++ compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=cuda-venv /venv /venv
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="img2img-worker (cuda)" \
      org.opencontainers.image.description="Worker of img2img that runs diffusion models on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      img2img.packages="/venv/packages.txt"
