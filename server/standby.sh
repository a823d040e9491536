# Sourced by update.sh and backup.sh: their lock, what the gateway is told, and how it and vLLM are replaced while another answers.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # update.sh's variables

# A command in a container: inside CONTAINER COMMAND…
# Where a machine is busy, the runc 1.1 of Debian 13 now and then cannot start one: it seals a copy of itself, which the kernel refuses
# while it moves one of its pages ("Device or resource busy"). `docker exec` then ends with 126 and nothing has run, so that asking
# again is the same as asking once.
inside() {
    local code try
    for try in 1 2 3; do
        code=0
        docker exec "$@" || code=$?
        [[ $code == 126 ]] || break
    done
    return "$code"
}

# What HAProxy answers to a command: control COMMAND [CONTAINER]
control() {
    local socket=$gateway_socket
    [[ ${2-} != gateway-gemma-standby ]] || socket=$gateway_standby_socket
    # shellcheck disable=SC2016  # Perl's own variable
    inside "${2:-gateway-gemma}" perl -MIO::Socket::UNIX -e '
        $gateway = IO::Socket::UNIX->new(shift) or die "$!\n";
        print $gateway shift, "\n";
        print <$gateway>' "$socket" "$1"
}
gateway_socket=/run/gateway/gateway.sock
gateway_standby_socket=/run/gateway/standby.sock

# Of one of the gateway's servers, as BACKEND/NAME: "UP QUEUED RUNNING"
traffic() { control "show stat ${1%/*} 4 -1" | awk -F, -v name="${1#*/}" '$2 == name {print $18, $3, $5}'; }

there() { [[ -n $(docker ps -aq --filter "name=^/$1$") ]]; }

runs() { [[ -n $(docker ps -q --filter "name=^/$1$") ]]; }

# One run at a time, and the healer in none: lock WHO
lock() {
    exec 9>>.lock
    flock -n 9 || { say "waiting for $(cat .lock)"; flock 9; }
    echo "$1 of $(whoami), process $$, since $(date '+%F %T %Z')" >.lock
}

# Asked directly, because Docker asks every few seconds only.
# shellcheck disable=SC2016  # the container's own variable
ready() { inside "$1" sh -c 'exec healthcheck.py "$SERVER_SOCKET" /ready' >/dev/null 2>&1; }

# The same of an agents service: answers CONTAINER [SOCKET]
answers() { inside "$1" healthcheck.py "${2-/run/agents/agents.sock}" /agents/ >/dev/null 2>&1; }

in_tailnet() { inside tailscale-vllm tailscale.sh health >/dev/null 2>&1; }

# The name that the gateway has for a vLLM's container.
server_of() { [[ $1 == vllm-gemma ]] && echo vllm/main || echo "vllm/${1/gemma-/}"; }

# await TIME COMMAND…: until it is true, at most TIME (seconds, with an s)
await() {
    local end=$((SECONDS + ${1%s}))
    until "${@:2}"; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

# What starts gets less of the CPUs than what serves; whoever has proven itself gets as much.
full_share() { docker update --cpu-shares 1024 "$1" >/dev/null; }

is_up() { [[ $(traffic "$1") == UP* ]]; }

is_idle() { [[ $(traffic "$1") == *' 0 0' ]]; }

# New requests go to this server too.
admit() { control "set server $1 state ready" >/dev/null && await 30s is_up "$1"; }

# No new request goes to this server, which ends those it has. Where none other is up they wait at the gateway.
drain() {
    control "set server $1 state drain" >/dev/null
    await "$longest" is_idle "$1" || {
        say "cuts off requests that take longer than GATEWAY_LONGEST_REQUEST, $longest: $(traffic "$1" | cut -d ' ' -f 3)"
        control "shutdown sessions server $1" >/dev/null
    }
}

remove() {
    docker stop "$1" >/dev/null 2>&1 || true
    docker rm -f "$1" >/dev/null 2>&1 || true
}

# What a run that was killed or has failed left behind: `unsettled` is there from before the first change at the gateway until all is
# as it should be. A standby that alone answers stays until another run, or the healer, finds the server ready.
unsettled=.unsettled
settle() {
    local name stays=''
    [[ -e $unsettled ]] || return 0
    if there gateway-gemma-standby && control 'show info' >/dev/null 2>&1; then
        remove gateway-gemma-standby
    fi
    if there agents-gemma-standby; then
        if answers agents-gemma && admit agents/main; then end_standby agents; else stays=1; fi
    fi
    for name in "${vllms[@]}"; do
        if ready "$name"; then
            full_share "$name"
            admit "$(server_of "$name")" || return 0
        elif ready vllm-gemma-standby; then
            say "$name does not answer and the standby does: it stays"
            return
        else
            control "set server $(server_of "$name") state ready" >/dev/null || return 0
        fi
    done
    ! there vllm-gemma-standby || end_standby vllm
    [[ $stays ]] || rm -f "$unsettled"
}

# end_standby BACKEND
end_standby() {
    say "ends the standby"
    drain "$1/standby" || true
    control "set server $1/standby state maint" >/dev/null || true
    remove "$1-gemma-standby"
}

# A second HAProxy takes over the port while the first is replaced; each ends what it has begun.
roll_gateway() {
    say "gateway-gemma: a second one takes over while it is replaced"
    touch "$unsettled"
    compose run -d -T --no-deps --name gateway-gemma-standby -e "GATEWAY_SOCKET=$gateway_standby_socket" -e "GATEWAY_BEFORE=$gateway_socket" gateway >/dev/null
    await 30s control 'show info' gateway-gemma-standby >/dev/null 2>&1 || die "the new gateway does not start, and nothing was replaced: $(docker logs gateway-gemma-standby 2>&1)"
    compose up -d --no-build gateway || die "the gateway was not replaced, see above; the second one answers, and another run goes on from there"
    await 30s control 'show info' >/dev/null 2>&1 || die "the gateway does not start: docker logs gateway-gemma; the second one answers"
    remove gateway-gemma-standby
    inside gateway-gemma rm -f "$gateway_standby_socket"  # a later start would ask there for the port
}

# What is asked for while it is replaced would wait, for a second or two.
roll_agents() {
    local socket=/run/agents/agents-standby.sock
    say "agents-gemma: a second one takes over while it is replaced"
    touch "$unsettled"
    compose run -d -T --no-deps --name agents-gemma-standby -e "AGENTS_SERVER_SOCKET=$socket" agents >/dev/null
    await 30s answers agents-gemma-standby "$socket" || die "the new agents service does not start, and was not replaced: $(docker logs agents-gemma-standby 2>&1)"
    admit agents/standby || die "the gateway does not reach the second agents service: docker logs gateway-gemma"
    drain agents/main
    compose up -d --no-build agents || die "the agents service was not replaced, see above; the second one answers, and another run goes on from there"
    await 30s answers agents-gemma || die "the agents service does not start: docker logs agents-gemma; the second one answers"
    admit agents/main || die "the gateway does not reach agents-gemma: docker logs gateway-gemma; the second one answers"
    end_standby agents
}

# It ends sessions through it, this run's own be it one of them; the run goes on.
roll_sidecar() {
    say "tailscale-vllm: is replaced"
    compose up -d --no-build tailscale || die "tailscale-vllm was not replaced, see above; another run goes on from there"
    await 60s in_tailnet && return
    say "tailscale-vllm is not in the tailnet, and what was before returns: $(inside tailscale-vllm tailscale.sh health 2>&1)"
    differs || {
        TAILSCALE_VLLM_TAG=${former_sidecar:-dev}
        keep_tags
        compose up -d --no-build tailscale
    }
    bring_back
}

# Whether this host has memory for a second of the vLLM: surge or queue.
strategy() {
    local used free
    [[ $update_strategy == auto ]] || { echo "$update_strategy"; return; }
    if [[ $gpu ]]; then
        read -r used free < <(inside "$1" nvidia-smi --query-gpu=memory.used,memory.free --format=csv,noheader,nounits | grep -m1 '^[0-9]' | tr , ' ')
    else
        used=$(docker top "$1" -eo pid,rss | awk '{sum += $2} END {print sum + 0}')
        free=$(awk '$1 == "MemAvailable:" {print $2}' /proc/meminfo)
    fi
    ((used > 0 && free > used)) && echo surge || echo queue
}

# Starts a vLLM of the new image and settings beside NAME and proves it.
start_standby() {
    local name=$1 since
    say "$name: starts a standby"
    since=$(date +%s)
    compose run -d -T --no-deps --name vllm-gemma-standby -e SERVER_SOCKET=/run/vllm/vllm-standby.sock "${name/gemma/server}" >/dev/null \
        || die "the standby was not started, see above; nothing was replaced"
    # Half a share, for what serves goes before what starts; and one that crashes has failed.
    docker update --cpu-shares 512 --restart no vllm-gemma-standby >/dev/null
    follow vllm-gemma-standby "$since" "$name serves as before."
    inside vllm-gemma-standby adapter_manager.py check || die "the standby does not answer as it should, see above; $name serves as before"
    full_share vllm-gemma-standby
}

# Where no standby answers, what served last has to.
bring_back() {
    ! differs || (go_back "$(serving)") || true
    exit 1
}

# Replaces one vLLM while a standby answers in its place, or while requests wait at the gateway.
roll_vllm() {
    local name=$1 how=$2 server since
    server=$(server_of "$name")
    touch "$unsettled"
    if [[ $how == surge ]]; then
        ready vllm-gemma-standby || start_standby "$name"
        say "$name: the standby takes over"
        admit vllm/standby || die "the gateway does not reach the standby: docker logs gateway-gemma; $name serves as before"
    else
        say "$name: requests wait while it is replaced"
    fi
    drain "$server"
    keep_tags
    say "$name: is replaced"
    since=$(date +%s)
    # Without --no-deps, with which Compose would give the container another hash and replace it again at the next `up`.
    compose up -d --no-build "${name/gemma/server}" || die "$name was not replaced, see above; another run goes on from there"
    docker update --cpu-shares 256 "$name" >/dev/null
    (
        follow "$name" "$since"
        inside "$name" adapter_manager.py check || die "$name does not answer as it should, see above; another run goes on from there"
    ) || { [[ $how == surge ]] || bring_back; exit 1; }
    full_share "$name"
    admit "$server" || die "the gateway does not reach $name: docker logs gateway-gemma"
    say "$name: serves"
    ! there vllm-gemma-standby || end_standby vllm
}
