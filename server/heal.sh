#!/bin/bash
# Mends what Docker does not: sharers of a namespace that is gone, containers left Exited or Created, unhealthy ones.
# systemd/ runs it when Docker starts and every 30 s; silent when all is well. It undoes a `docker compose stop`: for
# maintenance, systemctl stop function-gemma-heal.timer.
set -euo pipefail

project=function-gemma-server
# Seconds that an unhealthy container is left alone after a start. The sidecar is unhealthy while the tailnet is away, which no start
# mends; a vLLM that has listened and gives no token is stuck.
rest() { [[ $1 == vllm-* ]] && echo 60 || echo 600; }

cd "$(dirname "$(readlink -f "$0")")"
exec 9>>.lock
flock -n 9 || exit 0  # an update is at work
# So is a person.
! cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' | grep -qE 'docker-compos[e] compose .*\b(up|down|create|start|stop|restart|rm|run)\b' || exit 0

mapfile -t all < <(docker ps -aq --no-trunc --filter "label=com.docker.compose.project=$project" --filter label=com.docker.compose.oneoff=False)
[[ ${#all[@]} -gt 0 ]] || exit 0  # never started, or taken down

say() {
    echo "the healer, process $$, since $(date '+%F %T %Z')" >.lock || true  # on a full disk it mends as well
    echo "heal.sh: $*"
}

# NAME STATE PID NETWORK STARTED HEALTH LAST-OUTPUT, a line for each container
inspect() {
    docker inspect -f '{{slice .Name 1}} {{.State.Status}} {{.State.Pid}} {{.HostConfig.NetworkMode}} {{.State.StartedAt}} {{with .State.Health}}{{.Status}}{{$last := ""}}{{range .Log}}{{$last = .Output}}{{end}} {{printf "%q" $last}}{{end}}' "$@"
}

[[ ! -e .unsettled ]] || ./update.sh --settle  # a run was killed

idle=$(inspect "${all[@]}" | awk '$1 == "function-gemma-pod" {pod = 1} $2 == "exited" || $2 == "created" || $2 == "dead" {printf " %s", $1}
                                  END {if (!pod) printf " function-gemma-pod"}')
# Removed ones too, once update.sh has brought all of them up.
if grep -qs ^FUNCTION_GEMMA_TAG= .env; then
    idle+=$(comm -23 <(docker compose config --services | sort) \
        <(docker inspect -f '{{index .Config.Labels "com.docker.compose.service"}}' "${all[@]}" | sort) | sed 's/^/ /' | tr -d '\n')
fi
if [[ -n $idle ]]; then
    say "not running:$idle"
    docker compose up -d --no-build --no-recreate </dev/null
    mapfile -t all < <(docker compose ps -aq --no-trunc)
fi

# By name: the gateway before the sidecar, so that who gets through is heard, and last vLLM, which takes longest to end.
pod=$(docker inspect -f '{{.Id}} {{.State.Pid}}' function-gemma-pod)
namespace=$(readlink "/proc/${pod#* }/ns/net")
while read -r name state pid network started health output; do
    [[ $state == running ]] || continue
    if [[ $network == container:* && $network != "container:${pod% *}" ]]; then
        say "$name belongs to a pod that was replaced"
        docker stop "$name" </dev/null
        docker rm "$name" </dev/null
        docker compose up -d --no-build --no-recreate </dev/null
    elif [[ $network == container:* && $(readlink "/proc/$pid/ns/net") != "$namespace" ]]; then
        say "$name is in a network namespace that is gone"
        docker restart "$name" </dev/null
    elif [[ $health == unhealthy && $output != '"waiting: '* && $(date -d "$started" +%s) -lt $(($(date +%s) - $(rest "$name"))) ]]; then
        say "$name is unhealthy: $output"
        docker restart -t 10 "$name" </dev/null
    fi
done < <(inspect "${all[@]}" | sort)
