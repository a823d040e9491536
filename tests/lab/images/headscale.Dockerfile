# The control plane.
ARG BASE
FROM ${BASE}
COPY headscale /usr/local/bin/headscale
