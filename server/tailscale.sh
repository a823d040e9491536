#!/bin/sh
# Joins the tailnet as function-gemma-server and stays in it, by Tailscale's own containerboot.
#   tailscale.sh          run; without a key and a former login, one login URL in the log
#   tailscale.sh health   the container's health check
#   tailscale.sh CMD…     run CMD
# tailscale.env may set TAILSCALE_LOGIN_SERVER (unset: Tailscale's own), TAILSCALE_TAGS (the tags that own the node)
# and TAILSCALE_EXTRA_ARGS (of `tailscale up`).
set -eu

name=function-gemma-server
authkey=/run/secrets/tailscale/authkey
joined=/run/tailscale/joined
refused=/run/tailscale/refused

say() { echo "tailscale.sh: $*"; }

status() { tailscale status --json --peers=false 2>/dev/null; }

running() { status | grep -q '"BackendState": "Running"'; }

key_state() { cksum "$authkey" 2>/dev/null || true; }

health() {
    if [ -e "$refused" ]; then
        echo "waiting: $(cat "$refused")"
        return 1
    fi
    if status | grep -q '"AuthURL": "http'; then
        echo "waiting: visit the login URL shown by: docker logs tailscale-vllm"
        return 1
    fi
    running || { echo "not in the tailnet: docker logs tailscale-vllm"; return 1; }
    wget -q -O /dev/null http://127.0.0.2:9002/healthz || { echo "containerboot sees no tailnet address"; return 1; }
    # Only loopback is left in a namespace whose pod is gone.
    [ "$(wc -l </proc/net/route)" -gt 1 ] || { echo "no network: the pod was restarted under this container"; return 1; }
}

# containerboot gives a node that is logged in no arguments any more, so what must hold at every start is set here.
# A key that appears while the login is awaited is used at once.
settle() {
    until running; do
        [ "$(key_state)" = "$key" ] || { say "$authkey has changed: starting again"; kill "$boot"; return; }
        sleep 1
    done
    until tailscale set --ssh --hostname="$name"; do sleep 5; done
    touch "$joined"
    say "in the tailnet as $(tailscale status --json --peers=false | sed -n 's/^ *"DNSName": "\(.*\)",$/\1/p'), $(tailscale ip -4)"
}

run() {
    mkdir -p /run/tailscale
    rm -f "$joined" "$refused"
    key=$(key_state)
    export TS_STATE_DIR=/var/lib/tailscale
    export TS_SOCKET=/var/run/tailscale/tailscaled.sock
    export TS_HOSTNAME="$name"
    export TS_USERSPACE="${TS_USERSPACE:-true}"
    # A key is for a node without state: one that has expired since then must not lock out a node that is in the tailnet.
    export TS_AUTH_ONCE=true
    [ ! -s "$authkey" ] || export TS_AUTHKEY="file:$authkey"
    # containerboot gives up after a minute by itself, and a new start shows another login URL.
    export TS_BOOT_TIMEOUT=87600h
    export TS_ENABLE_HEALTH_CHECK=true
    # In userspace mode the tailnet reaches whatever listens on 127.0.0.1.
    export TS_LOCAL_ADDR_PORT=127.0.0.2:9002
    # A tagged key carries its tags (headscale refuses to hear them again); only an OAuth secret needs them named.
    export TS_EXTRA_ARGS="${TAILSCALE_TAGS:+--advertise-tags=$TAILSCALE_TAGS} ${TAILSCALE_LOGIN_SERVER:+--login-server=$TAILSCALE_LOGIN_SERVER} ${TAILSCALE_EXTRA_ARGS:-}"
    # A control plane on plain http has its relay there too.
    case ${TAILSCALE_LOGIN_SERVER:-} in http://*) export TS_DEBUG_USE_DERP_HTTP=1 ;; esac

    containerboot &
    boot=$!
    trap 'kill "$boot"' TERM INT
    settle &
    settle=$!
    code=0
    while kill -0 "$boot" 2>/dev/null; do  # a trapped signal ends `wait` early
        code=0
        wait "$boot" || code=$?
    done
    [ "$code" -ne 1 ] || [ -e "$joined" ] || refuse
    exit "$code"
}

# The tailnet did not take the node: no crash loop, but a wait for another key; a passing fault is tried again after 5 minutes.
refuse() {
    why="the tailnet did not take this node: \`backend error\` in docker logs tailscale-vllm says why; a new key in server/secrets/tailscale/authkey is used at once"
    kill "$settle"
    trap 'exit 0' TERM INT
    say "$why"
    echo "$why" >"$refused"
    seconds=0
    while [ "$(key_state)" = "$key" ] && [ "$seconds" -lt 300 ]; do
        sleep 2 &
        wait $!
        seconds=$((seconds + 2))
    done
}

case ${1-run} in
run) run ;;
health) health ;;
*) exec "$@" ;;
esac
