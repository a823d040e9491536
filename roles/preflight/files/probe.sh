#!/bin/sh
# What the preflight wants to know of a host, as one JSON object. It needs nothing but a POSIX shell and changes nothing.
# shellcheck disable=SC1091  # every host has its own
. /etc/os-release
yes_if() { if "$@" >/dev/null 2>&1; then echo true; else echo false; fi; }
# Where the images go: what is asked for, else where the engine keeps them now.
engine=$(docker info --format '{{.DockerRootDir}} {{.DriverStatus}}' 2>/dev/null)
case $engine in *io.containerd.snapshotter.v1*) engine=/var/lib/containerd ;; esac
root=${DATA_ROOT:-${engine%% *}}
root=${root:-$(sed -n 's/.*"data-root" *: *"\([^"]*\)".*/\1/p' /etc/docker/daemon.json 2>/dev/null)}
root=${root:-/var/lib/docker}
# An uninstall takes Docker and leaves the node's state, where another Docker finds it.
state=$(docker volume inspect --format '{{.Mountpoint}}' function-gemma-server_tailscale-state 2>/dev/null ||
  echo "$root/volumes/function-gemma-server_tailscale-state/_data")/tailscaled.state
there=$root
while ! [ -d "$there" ]; do there=$(dirname "$there"); done
# The classes of NVIDIA's devices on the PCI bus; a driver is not needed for that.
gpus=$(grep -lx 0x10de /sys/bus/pci/devices/*/vendor 2>/dev/null | sed 's/vendor$/class/')
# shellcheck disable=SC2086  # $gpus is a list of files
printf '{"os": "%s", "release": "%s", "python": "%s", "root": %s, "systemd": %s, "compose": "%s", "image": %s, "joined": %s, "data_root": "%s", "free": %s, "gpu": %s}\n' \
  "$ID" "${VERSION_ID:-0}" \
  "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" \
  "$(yes_if test "$(id -u)" = 0)" \
  "$(yes_if test -d /run/systemd/system)" \
  "$(docker buildx version >/dev/null 2>&1 && docker compose version --short)" \
  "$(yes_if test -n "$(docker image ls -q vllm-gemma 2>/dev/null)")" \
  "$(yes_if grep -q profile- "$state")" \
  "$root" \
  "$(df -P -k "$there" 2>/dev/null | awk 'NR == 2 { print int($4 / 1048576) }')" \
  "$(yes_if grep -q ^0x03 /dev/null $gpus)"
