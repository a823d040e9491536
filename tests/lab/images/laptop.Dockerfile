# A user's machine on the tailnet: Tailscale in kernel mode, uv, ssh, curl.
ARG BASE
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 iproute2 iptables openssh-client curl git
COPY tailscaled uv /usr/local/bin/
RUN ln -s tailscaled /usr/local/bin/tailscale
