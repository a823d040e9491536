#!/bin/sh
# In the sidecar, as /root/update.sh, doctor, backup.sh and adapter_manager.py: what `ssh root@function-gemma-server ./update.sh` runs.
# The host's own git and docker compose do the work, for two versions of compose would recreate each other's containers.
set -eu

case ${0##*/} in
adapter_manager.py)
    exec docker exec -i vllm-gemma adapter_manager.py "$@"
    ;;
backup.sh | doctor | update.sh)
    checkout=$(docker inspect -f '{{range .Mounts}}{{if eq .Destination "/app"}}{{.Source}}{{end}}{{end}}' tailscale-vllm)
    image=$(docker inspect -f '{{.Image}}' tailscale-vllm)
    # A container of its own that enters the host's namespaces. Whoever may use docker.sock is root on the host already.
    set -- --network=none --pid=host --cap-add SYS_ADMIN --cap-add SYS_PTRACE --cap-add SYS_CHROOT \
        --security-opt apparmor=unconfined --security-opt seccomp=unconfined --entrypoint nsenter \
        "$image" -t 1 -m -u -i -n -p -- env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        "$checkout/server/${0##*/}" "$@"
    [ "${0##*/}" = update.sh ] || exec docker run --rm -i --log-driver none "$@"
    # The update goes on when this session, or the sidecar itself, ends.
    docker container prune -f --filter label=function-gemma.update >/dev/null
    helper=$(docker run -d --label function-gemma.update "$@")
    echo "update.sh: runs on the host; should this session end, it goes on: $checkout/server/.update.log"
    docker logs -f "$helper"
    code=$(docker wait "$helper")
    docker rm "$helper" >/dev/null
    exit "$code"
    ;;
esac
