#!/bin/bash
# Saves what cannot be made again, the adapters with their history and the node's identity, and brings it back.
#   backup.sh save >FILE
#   backup.sh restore [--identity] <FILE
# save      while all serves. Whoever has the file can be the node: keep it as you keep a key
# restore   the adapters become those of the backup; requests wait at the gateway meanwhile. All of the file is read and checked
#           before anything changes, and what was there stays until all of it is replaced: after a kill run it again
# --identity  the node too: it has the name and address that it had, and no other machine may be this node still
set -euo pipefail

say() { echo "backup.sh: $*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '2,/^set/{/^set/d;s/^# //;p}' "$0" >&2; exit 2; }

compose() { docker compose "$@" </dev/null; }

# Beside what runs, in a container that has the volumes and no network.
volumes() {
    docker run --rm -i --network none --read-only --user 0 --cap-drop ALL --cap-add DAC_OVERRIDE --cap-add CHOWN --cap-add FOWNER --cap-add FSETID \
        --security-opt no-new-privileges:true --log-driver none --label function-gemma.backup -v "$PWD/backup.py:/backup.py:ro" \
        -v "$project"_models-adapters:/volumes/models-adapters -v "$project"_tailscale-state:/volumes/tailscale-state \
        --entrypoint python3 "$(docker inspect -f '{{.Config.Image}}' vllm-gemma)" /backup.py "$@"
}
project=function-gemma-server

restore() {
    local parts=(models-adapters) services name
    [[ ! ${1-} ]] || parts+=(tailscale-state)
    [[ ! -t 0 ]] || die "there is no backup on standard input: backup.sh restore <FILE"
    longest=$(docker exec gateway-gemma printenv GATEWAY_LONGEST_REQUEST) || die "nothing has changed: the gateway does not run, see server/doctor"
    exec 9>>.lock
    flock -n 9 || { say "waiting for $(cat .lock)"; flock 9; }
    echo "backup.sh restore, process $$, since $(date '+%F %T %Z')" >.lock
    volumes stage "${parts[@]}" || die "nothing has changed, see above"
    mapfile -t services < <(compose config --services | grep -E "^vllm-server${1:+|^tailscale$}")
    mapfile -t vllms < <(docker ps --format '{{.Names}}' --filter 'name=^/vllm-gemma')
    say "stops: ${services[*]}"
    touch "$unsettled"  # what was killed from here on, the healer ends
    for name in "${vllms[@]}"; do drain "$(server_of "$name")"; done
    compose stop "${services[@]}"
    volumes swap "${parts[@]}" </dev/null || die "not done, see above: run it again"
    say "starts: ${services[*]}"
    compose up -d --no-build --no-recreate --wait --wait-timeout 900 "${services[@]}" || die "not healthy: server/doctor says why"
    settle
    docker exec vllm-gemma adapter_manager.py list
}

cd "$(dirname "$(readlink -f "$0")")"
# shellcheck source=server/standby.sh
source ./standby.sh
trap '' HUP
case "$*" in
save)
    [[ ! -t 1 ]] || die "a backup is no text: backup.sh save >FILE"
    volumes save models-adapters tailscale-state </dev/null
    ;;
restore) restore ;;
"restore --identity") restore identity ;;
*) usage ;;
esac
