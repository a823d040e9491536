#!/bin/sh
# In the sidecar, as /root/update.sh, /root/doctor, /root/backup.sh and /root/adapter_manager.py: what `ssh root@function-gemma-server ./update.sh` runs.
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
    case ${0##*/} in
    doctor) exec docker run --rm "$@" ;;
    backup.sh)
        case " $* " in *" save ") [ ! -t 1 ] || { echo "backup.sh: a backup holds the node's key and goes to a file: backup.sh save >FILE" >&2; exit 1; } ;; esac
        # Docker keeps no copy of what passes, and the end of the session does not reach the run.
        exec docker run --rm -i --log-driver none --sig-proxy=false "$@"
        ;;
    esac
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
