# syntax=docker/dockerfile:1
# The gateway: REST, Cloudflare's dialect and gRPC. No torch, no model, no worker. From the repository's root:
#   docker build -f deploy/gateway.Dockerfile -t img2img-gateway .

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
# "@sha256:…" holds the base to one build of that tag; without it the tag's security updates come along.
ARG PYTHON_DIGEST=""

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS base

# Our own code as a wheel, with no part of the worker.
FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY img2img img2img
COPY gateway gateway
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip wheel --no-deps --wheel-dir /dist .

# A virtual environment. What the code needs comes before the code, whose changes leave that layer alone: an empty
# package stands in for it, since pip installs the requirements of a package, not those of a pyproject.toml.
FROM base AS build
WORKDIR /src
COPY pyproject.toml requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir img2img && touch README.md img2img/__init__.py \
    && python3 -m venv --without-pip /venv \
    && python3 -m pip --python /venv/bin/python install --constraint requirements.lock ".[gateway]"
COPY --from=wheel /dist /dist
RUN python3 -m pip --python /venv/bin/python install --no-deps --force-reinstall /dist/*.whl \
    && python3 -m pip --python /venv/bin/python freeze > /venv/packages.txt

FROM base AS gateway
# As process 1 Python would not heed a signal that it has not asked for; tini passes them on, and reaps.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 img2img \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin img2img \
    && install -d -o 10001 -g 10001 /cache /var/lib/img2img
COPY --from=build /venv /venv
COPY deploy/healthcheck.py /usr/local/lib/img2img/healthcheck.py
# The root may be read-only: nothing is written but below /tmp, /cache and /var/lib/img2img (the keys of compose.yaml).
ENV PATH=/venv/bin:$PATH \
    HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    IMG2IMG_HOST=0.0.0.0
WORKDIR /var/lib/img2img
USER 10001:10001
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-I", "-S", "/usr/local/lib/img2img/healthcheck.py", "gateway"]
ENTRYPOINT ["tini", "--", "img2img"]
CMD ["gateway"]

ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="img2img-gateway" \
      org.opencontainers.image.description="Front ends of img2img: REST, Cloudflare's dialect and gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      img2img.packages="/venv/packages.txt"
