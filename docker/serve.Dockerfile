# Serves releases with Triton, on CPU and GPU nodes: docker build -f docker/serve.Dockerfile -t peregrine-serve .
#
# BASE      an image with /opt/tritonserver, at least 26.08: it brings Triton, CUDA, TensorRT and Python 3.12
# LOCK      exact versions for the base's Python: serve-py312.lock, or serve-py311.lock
# REVISION  the commit, for the labels
ARG BASE=nvcr.io/nvidia/tritonserver:26.09-py3

# --- packages: all that needs pip stays in this stage
# hadolint ignore=DL3006
FROM ${BASE} AS packages
ARG LOCK=serve-py312.lock
# hadolint ignore=DL3002
USER 0
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY docker/install.sh docker/${LOCK} docker/
COPY pyproject.toml README.md peregrine.py ./
COPY builders builders/
COPY ensemble ensemble/
COPY clients clients/
RUN docker/install.sh "docker/${LOCK}" /opt/peregrine

# --- the image
# hadolint ignore=DL3006
FROM ${BASE}
ARG BASE
ARG REVISION=unknown
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="peregrine-serve" \
      org.opencontainers.image.description="Ranked lists over gRPC, by Triton" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
COPY --from=packages /opt/peregrine /opt/peregrine
# A user without a name of its own: nothing in the image is writable for it. State, route and log are volumes.
ENV PATH=/opt/peregrine/bin:/opt/tritonserver/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    PEREGRINE_CATALOGUE=/catalogue
USER 1000:1000
WORKDIR /tmp
VOLUME ["/releases", "/catalogue", "/state"]
EXPOSE 8001 8002 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=300s --retries=3 \
    CMD ["peregrine", "status", "--ready", "--repository", "/releases"]
ENTRYPOINT ["peregrine"]
CMD ["serve", "--repository", "/releases", "--state", "/state/serve", "--address", "0.0.0.0", "--http-port", "8080"]
