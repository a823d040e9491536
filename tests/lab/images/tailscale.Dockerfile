# Stand-in of tailscale/tailscale: the real tailscaled and containerboot on Debian instead of Alpine.
ARG BASE
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends iptables iproute2 wget
COPY tailscaled containerboot apk /usr/local/bin/
RUN ln -s tailscaled /usr/local/bin/tailscale
CMD ["/usr/local/bin/containerboot"]
