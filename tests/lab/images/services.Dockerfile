# The internet's side: registry mirror, git forge and model hub run from this one image.
ARG BASE
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends docker-registry openssh-server git python3 iproute2 \
 && rm -f /etc/ssh/ssh_host_* && mkdir -p /run/sshd /srv/git \
 && useradd --create-home --shell /bin/sh git
