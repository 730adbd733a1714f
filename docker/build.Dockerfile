# Trains, exports, indexes and verifies releases: docker build -f docker/build.Dockerfile -t peregrine-build .
#
# BASE      an image with Python 3.11
# REVISION  the commit, for the labels
# torch is pinned to its CPU build: where pip finds only the CUDA one, --build-arg PIP_EXTRA_INDEX_URL=… names
# PyTorch's CPU wheels.
ARG BASE=python:3.11-slim

# --- packages: all that needs pip stays in this stage
# hadolint ignore=DL3006
FROM ${BASE} AS packages
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# hadolint ignore=DL3002
USER 0
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY docker/install.sh docker/build-py311.lock docker/
COPY pyproject.toml README.md peregrine.py ./
COPY builders builders/
COPY ensemble ensemble/
COPY clients clients/
RUN docker/install.sh docker/build-py311.lock /opt/peregrine

# --- the image
# hadolint ignore=DL3006
FROM ${BASE}
ARG BASE
ARG REVISION=unknown
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="peregrine-build" \
      org.opencontainers.image.description="Trains a shop's models and publishes releases for Triton" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
COPY --from=packages /opt/peregrine /opt/peregrine
ENV PATH=/opt/peregrine/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
USER 1000:1000
WORKDIR /tmp
VOLUME ["/shops", "/releases"]
STOPSIGNAL SIGTERM
# A build is a job that ends: nothing has to ask after its health.
HEALTHCHECK NONE
ENTRYPOINT ["peregrine"]
CMD ["build", "--help"]
