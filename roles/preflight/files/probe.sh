#!/bin/sh
# What the preflight wants to know of a host, as one JSON object. It needs nothing but a POSIX shell and changes nothing.
# shellcheck disable=SC1091  # every host has its own
. /etc/os-release
yes_if() { if "$@" >/dev/null 2>&1; then echo true; else echo false; fi; }
state=$(docker volume inspect --format '{{.Mountpoint}}' function-gemma-server_tailscale-state 2>/dev/null)/tailscaled.state
printf '{"os": "%s", "release": "%s", "python": "%s", "root": %s, "systemd": %s, "foreign": %s, "compose": "%s", "image": %s, "joined": %s, "free": %s}\n' \
  "$ID" "${VERSION_ID:-0}" \
  "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" \
  "$(yes_if test "$(id -u)" = 0)" \
  "$(yes_if test -d /run/systemd/system)" \
  "$(yes_if dpkg -s docker-ce)" \
  "$(docker buildx version >/dev/null 2>&1 && docker compose version --short)" \
  "$(yes_if test -n "$(docker image ls -q vllm-gemma 2>/dev/null)")" \
  "$(yes_if grep -q profile- "$state")" \
  "$(df -P -k /var/lib/docker /var/lib 2>/dev/null | awk 'NR == 2 { print int($4 / 1048576) }')"
