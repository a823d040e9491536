# The bare host: Debian 13 with systemd and SSH, as a provider hands it over. No Docker, no Tailscale.
ARG BASE
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends systemd systemd-sysv dbus python3 python3-apt git curl iproute2 iptables \
      openssh-server sudo gnupg \
 && rm -f /etc/ssh/ssh_host_* \
 && systemctl enable ssh
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init"]
