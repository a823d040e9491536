# Debian 13 and the certificates this machine trusts: what every image of the lab stands on.
ARG DEBIAN
FROM ${DEBIAN}
COPY ca/ /usr/local/share/ca-certificates/
# Packages are unpacked without a sync each and without manuals: a lost image is built again.
RUN update-ca-certificates \
 && echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/unsafe-io \
 && printf 'path-exclude=/usr/share/%s/*\n' doc man locale > /etc/dpkg/dpkg.cfg.d/no-manuals
# Python's and uv's own bundles do not know the machine's certificates.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    DEBIAN_FRONTEND=noninteractive
