#!/bin/bash
# Saves what cannot be made again, the adapters with their history and the node's identity, and brings it back.
#   backup.sh save >FILE                   a tar; who can read it can be the node
#   backup.sh restore [--identity] <FILE   the adapters, served without a restart; with --identity also name, address and keys of the node
# Two nodes with one identity cut each other off: --identity is for when the old node is gone.
# All of FILE is checked before anything changes; a run that was killed is completed by another. `save` holds the store's lock for
# the moment in which it notes what there is, and no other: an update changes neither the generations nor the identity. `restore`
# holds server/.lock, as update.sh does, so that neither it nor the healer starts a sidecar whose state is being replaced; its words
# are in server/.update.log too.
set -euo pipefail

say() { echo "backup.sh: $*"; }
die() { say "$*" >&2; exit 1; }
usage() { sed -n '2,/^set/{/^set/d;s/^# //;p}' "$0" >&2; exit 2; }

# backup.py in vLLM's image. No log: what `save` writes is secret, and Docker would keep it.
work() {
    docker run --rm -i --network none --log-driver none --read-only --user 0:0 --security-opt no-new-privileges:true \
        --cap-drop ALL --cap-add SETUID --cap-add SETGID --cap-add DAC_OVERRIDE --entrypoint backup.py \
        -v function-gemma-server_models-adapters:/models/adapters -v function-gemma-server_models-base:/models/base:ro \
        -v function-gemma-server_vllm-run:/run/vllm -v function-gemma-server_tailscale-state:/var/lib/tailscale \
        -v "$PWD/backup.py:/usr/local/bin/backup.py:ro" "$image" "$@"
}

# The sidecar ends, and with it a session through it; this goes on.
change_identity() {
    say "the node changes its identity; a session through it ends here"
    docker stop tailscale-vllm >/dev/null
    work take || { docker start tailscale-vllm >/dev/null; die "the node's identity could not be replaced, see above"; }
    docker start tailscale-vllm >/dev/null
    if ! await 90s in_tailnet; then
        docker stop tailscale-vllm >/dev/null
        work undo
        docker start tailscale-vllm >/dev/null
        die "the tailnet did not take the node of the backup within 90 s, so that it has its former identity again. Where the control plane has removed that node, restore without --identity"
    fi
    work settle
    say "the node is $(inside tailscale-vllm tailscale ip -4) on the tailnet"
}

restore() {
    work restore ${identity:+identity}
    [[ ! $identity ]] || change_identity </dev/null
}

{
    cd "$(dirname "$(readlink -f "$0")")"
    # shellcheck source=server/standby.sh
    source ./standby.sh
    word=${1-} identity=''
    [[ $# -lt 2 || "$*" == 'restore --identity' ]] || usage
    [[ $# -lt 2 ]] || identity=1
    [[ $word == save || $word == restore ]] || usage
    image=$(docker inspect -f '{{.Config.Image}}' vllm-gemma 2>/dev/null) || die "there is no vllm-gemma yet: server/update.sh --no-pull"
    if [[ $word == save ]]; then
        [[ ! -t 1 ]] || die "a backup holds the node's key and goes to a file: backup.sh save >FILE"
        node=$(inside tailscale-vllm tailscale status --json --peers=false 2>/dev/null | sed -n 's/^ *"DNSName": "\(.*\)",$/\1/p' | head -n1 || true)
        work save "${node:-function-gemma-server}" "${image#*:}" </dev/null
    else
        [[ ! -t 0 ]] || die "a backup is read on standard input: backup.sh restore <FILE"
        trap '' HUP PIPE
        lock backup.sh
        restore 2>&1 | tee -p .update.log 9>&-
    fi
    exit
}
