# Builds the Go programs and the stand-in of vLLM. Debian's Go fetches the toolchain that go.mod names.
ARG BASE
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends golang-go git gcc libc6-dev binutils python3 python3-venv python3-dev libnuma1 zstd
COPY uv /usr/local/bin/uv
