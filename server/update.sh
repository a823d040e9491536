#!/bin/bash
# Brings this host to what the checkout and the settings say, and proves it by a reply.
#   update.sh [--no-pull] [--plan | --build | --settle] [--sidecar] [SERVICE…]
#   update.sh [--plan] [--sidecar] --to NUMBER | former
#   update.sh --releases
# --no-pull  take the checkout as it is
# --plan     say what would be pulled, built and replaced, and change nothing
# --build    only build, beside another run: site.yml does while the node joins the tailnet
# --settle   only end what a run that was killed left beside the servers; heal.sh asks for it
# --to       go back to a release on record, its code, settings and images; `former`: what served before, or what serves after
#            an update that failed. Adapters stay as they are: adapter_manager.py has a rollback of its own
# --releases show what is on record: the last UPDATE_RELEASES_KEPT (.env; 3) that served
# --sidecar  replace the sidecar too where it differs, after all else, and take it back unless it is in the tailnet a minute later.
#            Not asked for, one that runs stays as it is, for the sessions through it end, and is named
# SERVICE    only these (default: all); `tailscale` asks for the sidecar
# What serves is replaced while another of the new kind answers in its place; see standby.sh. UPDATE_STRATEGY in .env: `surge` does
# that with vLLM too, `queue` lets requests wait at the gateway instead, `auto` (the default) is surge where memory suffices for two.
# Until a new vLLM has answered, nothing is replaced. The last line is `changed=0` or `changed=1`. Another run waits for the one that holds server/.lock. Neither the end of the
# session nor of the sidecar stops a run; server/.update.log has all it said.
set -euo pipefail

patience=900  # seconds until a vLLM answers: a large model is read and compiled

say() { echo "update.sh: $*"; }
die() {
    say "$*" >&2
    ! differs || say "back to the code and settings that served last, release $(serving): $checkout/server/update.sh --to $(serving)" >&2
    exit 1
}

compose() { docker compose "$@" </dev/null; }

# The checkout's own user pulls, so that its files stay theirs when root runs this.
git_() {
    local secrets=$PWD/secrets/git owner
    local command=(git -C "$checkout")
    [[ ! -e $secrets/deploy_key ]] || command+=(-c "core.sshCommand=ssh -i '$secrets/deploy_key' -o IdentitiesOnly=yes -o BatchMode=yes \
        -o UserKnownHostsFile='$secrets/known_hosts' -o StrictHostKeyChecking=accept-new")
    owner=$(stat -c %U "$checkout")
    [[ $EUID != 0 || $owner == root ]] || command=(runuser -u "$owner" -- env "HOME=$(getent passwd "$owner" | cut -d: -f6)" "${command[@]}")
    "${command[@]}" "$@" </dev/null
}

# Sets `changed`. A pull starts this script anew: the rest is the new code's to do.
pull() {
    local branch before after
    if ! branch=$(git_ symbolic-ref -q --short HEAD); then
        say "the checkout is at $(git_ describe --tags --always), on no branch: nothing is pulled"
        return
    fi
    before=$(git_ rev-parse HEAD)
    if [[ $plan ]]; then
        after=$(git_ ls-remote --exit-code "$(git_ config "branch.$branch.remote")" "$(git_ config "branch.$branch.merge")" | cut -f1) \
            || die "cannot reach $(git_ remote get-url origin), see above"
        [[ $after == "$before" ]] || { say "would pull $branch: ${before:0:12} → ${after:0:12}; what follows is the plan of the code that is here"; changed=1; }
        return
    fi
    git_ pull --quiet --ff-only || die "nothing was pulled and nothing has changed; see above. To mend it: git -C $checkout status; or go on without: server/update.sh --no-pull"
    after=$(git_ rev-parse HEAD)
    [[ $after != "$before" ]] || return 0
    say "pulled $branch: ${before:0:12} → ${after:0:12}"
    exec "$checkout/server/update.sh" --pulled ${sidecar:+--sidecar} "${services[@]}"
}

# A tag for what is built: the Dockerfile, the files that it copies and the base that .env names. The same code is the same image.
tag_of() {
    local dockerfile=$1 base=$2 sources
    mapfile -t sources < <(awk '$1 == "COPY" {for (i = 2; i < NF; i++) print $i}' "$dockerfile" | sort -u)
    { echo "$base" && hash_files "$dockerfile" "${sources[@]}"; } | sha256sum | cut -c1-12
}

# Names, contents and whether one is executable; not the other modes, which the clone's umask decides.
hash_files() {
    find "$@" -name __pycache__ -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum --
    find "$@" -name __pycache__ -prune -o -type f -perm -u=x -print | LC_ALL=C sort
}

tags() {
    local config
    config=$(compose config) || die "the compose files or server/.env are wrong, see above; nothing has changed"
    base_of() { sed -n "s/^ *$1: //p" <<<"$config"; }
    gpu=$(grep -m1 '^ *- gpu$' <<<"$config" || true)
    longest=$(base_of GATEWAY_LONGEST_REQUEST | head -n1)
    [[ ${longest:=0s} =~ ^[0-9]+s$ ]] || die "GATEWAY_LONGEST_REQUEST in server/.env is seconds with an s, such as 300s, not $longest"
    FUNCTION_GEMMA_TAG=$(tag_of Dockerfile "$(base_of VLLM_IMAGE)")
    TAILSCALE_VLLM_TAG=$(tag_of Dockerfile.tailscale "$(base_of TAILSCALE_IMAGE)")
    GATEWAY_CONFIG_TAG=$(hash_files haproxy | sha256sum | cut -c1-12)
    vllms=(vllm-gemma)  # and those of further GPUs, which go with the first
    mapfile -t -O 1 vllms < <(sed -nE 's/^ *container_name: (vllm-gemma-[0-9]+)$/\1/p' <<<"$config")
    former_sidecar=$(sed -n 's/^TAILSCALE_VLLM_TAG=//p' .env 2>/dev/null || true)
    if [[ $all ]]; then
        [[ $sidecar ]] || ! runs tailscale-vllm || spared=tailscale
        mapfile -t services < <(compose config --services | grep -vx "$spared")
    elif wants vllm-server; then
        services+=("${vllms[@]/gemma/server}")
    fi
    export FUNCTION_GEMMA_TAG TAILSCALE_VLLM_TAG GATEWAY_CONFIG_TAG
}

# A plain `docker compose up -d` later means the same images; a tag whose image was not asked for stays what it was.
keep_tags() {
    local name env
    env=$(cat .env 2>/dev/null || true)
    for name in "${kept_tags[@]}"; do
        env=$(sed "/^$name=/d" <<<"$env" && echo "$name=${!name}")
    done
    [[ $env != "$(cat .env 2>/dev/null)" ]] || return 0
    sed '1{/^$/d}' <<<"$env" >.env.new
    chmod --reference=.env .env.new 2>/dev/null || true
    mv .env.new .env
}

# Which services' images are to be built: `build`. Which containers compose would create, replace or start: `replace`.
survey() {
    local lines
    build=() replace=() kept_tags=()
    if wants gateway; then
        kept_tags+=(GATEWAY_CONFIG_TAG)
    fi
    if wants vllm-server || wants agents; then
        kept_tags+=(FUNCTION_GEMMA_TAG)
        [[ -n $(docker image ls -q "vllm-gemma:$FUNCTION_GEMMA_TAG") ]] || build+=(vllm-server)
    fi
    if wants tailscale; then
        kept_tags+=(TAILSCALE_VLLM_TAG)
        [[ -n $(docker image ls -q "tailscale-vllm:$TAILSCALE_VLLM_TAG") ]] || build+=(tailscale)
    fi
    lines=$(compose --dry-run up -d --no-build --pull never "${services[@]}" ${spared:+"$spared"} 2>&1) || die "$lines"
    mapfile -t replace < <(sed -nE 's/.* Container ([0-9a-f]{12}_)?([^ ]+) +(Recreate|Creating|Starting)$/\2/p' <<<"$lines" | sort -u)
    # A pod that is replaced takes with it what lives in it.
    if replaces function-gemma-pod && [[ $1 != again ]]; then
        spared=''
        # Compose prints an empty line where there is no container yet.
        mapfile -t -O "${#services[@]}" services < <(compose ps -a --orphans=false --services | sed /^$/d)
        survey again
    elif [[ $spared ]]; then
        ! replaces tailscale-vllm || say "tailscale-vllm differs and stays as it is, for the sessions through it would end. When that suits: $checkout/server/update.sh --no-pull tailscale"
        mapfile -t replace < <(printf '%s\n' "${replace[@]}" | sed '/^$/d;/^tailscale-vllm$/d')
        TAILSCALE_VLLM_TAG=${former_sidecar:-dev}
    fi
}

wants() { [[ " ${services[*]} " == *" $1 "* ]]; }

replaces() { [[ " ${replace[*]} " == *" $1 "* ]]; }

# HEALTH RESTARTS OUTPUT of a container, where the output is what the last health checks said
inspect() { docker inspect -f '{{.State.Health.Status}} {{.RestartCount}} {{range .State.Health.Log}}{{.Output}} {{end}}' "$1" | tr '\n' ' '; }

# follow NAME SINCE [CONSEQUENCE]: until the vLLM is ready, showing its log from SINCE on; not while it waits for a model, has
# ended or crashes again and again.
follow() {
    local name=$1 since=$2 consequence=${3-Its log: docker logs $1.} follower health restarts output first='' second=0 failed=''
    docker inspect "$name" >/dev/null 2>&1 || die "there is no $name yet: server/update.sh --no-pull"
    docker logs -f --since "$since" "$name" 2>&1 9>&- &  # it outlives a kill of this, and the lock must not
    follower=$!
    until ready "$name"; do
        read -r health restarts output < <(inspect "$name" && echo)
        if ! runs "$name" || [[ $output == *'no model'* || $health == unhealthy && $output != *waiting:* ]] || ((restarts > ${first:=$restarts} + 1 || second++ >= patience)); then
            failed=1
            break
        fi
        sleep 1
    done
    kill "$follower" 2>/dev/null || true
    wait "$follower" 2>/dev/null || true
    [[ ! $failed ]] || die "$name does not serve: it is $health after $((restarts - ${first:-restarts})) restarts. ${output##*waiting: } $consequence"
}

main() {
    plan='' build_only='' settle_only='' changed=0 services=() all='' sidecar='' spared=''
    local pull=1 to='' since name
    for word in "$@"; do
        if [[ $to == next ]]; then
            to=$word
            continue
        fi
        case $word in
        --no-pull) pull='' ;;
        --pulled) pull='' changed=1 ;;
        --plan) plan=1 ;;
        --build) build_only=1 ;;
        --settle) pull='' settle_only=1 ;;
        --to) pull='' to=next ;;
        --sidecar) sidecar=1 ;;
        --releases) list_releases; return ;;
        -*) sed -n '2,/^set/{/^set/d;s/^# //;p}' "$0" >&2; exit 2 ;;
        *) services+=("$word") ;;
        esac
    done
    [[ ${#services[@]} -gt 0 ]] || all=1
    ! wants tailscale || sidecar=1
    update_strategy=$(sed -nE "s/^UPDATE_STRATEGY=['\"]?([^'\"]*).*/\1/p" .env 2>/dev/null || true)
    [[ ${update_strategy:=auto} =~ ^(auto|surge|queue)$ ]] || die "UPDATE_STRATEGY in server/.env is auto, surge or queue, not $update_strategy"
    ! grep -qs ^GATEWAY_LONGEST_REQUEST= gateway.env || die "GATEWAY_LONGEST_REQUEST belongs in server/.env: move its line there from server/gateway.env"

    # git reads no .env; small letters are what it knows for http:// as well.
    set -a
    # shellcheck disable=SC1090  # every host has its own
    [[ ! -e .env ]] || source <(sed -nE 's/^((HTTPS?|NO)_PROXY)=/\L\1=/p' .env)
    set +a
    [[ -z $pull ]] || pull
    [[ -z $to ]] || go_back "$to"
    tags
    if [[ ! $plan && ! $build_only ]]; then
        settle
        [[ ! $settle_only ]] || return 0
        trap settle EXIT
    fi
    survey once
    for service in "${build[@]}"; do say "${plan:+would }build: the image of $service"; done
    [[ ! $build_only ]] || replace=()
    for container in "${replace[@]}"; do say "${plan:+would }replace or start: $container"; done
    [[ ${#build[@]} -eq 0 && ${#replace[@]} -eq 0 ]] || changed=1
    if [[ $plan ]]; then
        echo "changed=$changed"
        return
    fi

    [[ ${#build[@]} -eq 0 ]] || compose build --quiet "${build[@]}" || die "not built, see above; nothing was replaced"
    if [[ $build_only ]]; then
        echo "changed=$changed"
        return
    fi
    [[ ${#replace[@]} -eq 0 || ! $(serving) ]] || note_adapters "$(serving)"
    # What can be found wrong before anything is replaced, in containers of the new kind.
    [[ ${#replace[@]} -eq 0 ]] || compose up -d --no-build --no-recreate --quiet-pull pod
    if replaces gateway-gemma; then
        compose run --rm -T --no-deps --quiet-pull gateway haproxy -c -f /usr/local/etc/haproxy/haproxy.cfg \
            || die "haproxy/haproxy.cfg or gateway.env is wrong, see above; nothing was replaced"
    fi
    if [[ " ${replace[*]}" == *' vllm-gemma'* ]]; then
        for name in ${gpu:+"${vllms[@]/gemma/server}"}; do
            compose run --rm -T --no-deps --entrypoint nvidia-smi "$name" -L \
                || die "a container of the new image sees no GPU, see above; nothing was replaced. On the host, nvidia-smi -L and nvidia-ctk cdi list have to name it; site.yml sees to both"
        done
        compose run --rm -T --no-deps vllm-server fetch || die "nothing was replaced"
    fi
    if replaces gateway-gemma && runs gateway-gemma && ! replaces function-gemma-pod; then
        roll_gateway
    fi
    for name in "${vllms[@]}"; do
        if replaces "$name" && runs gateway-gemma && ! replaces function-gemma-pod && ready "$name"; then
            roll_vllm "$name" "$(strategy "$name")"
        fi
    done
    if replaces agents-gemma && runs gateway-gemma && ! replaces function-gemma-pod && answers agents-gemma; then
        roll_agents
    fi
    if replaces tailscale-vllm && ! replaces function-gemma-pod && in_tailnet; then
        roll_sidecar
    fi
    keep_tags
    since=$(date +%s)
    # All services includes to be rid of those that are in the compose files no more.
    [[ ${#replace[@]} -eq 0 ]] || compose up -d --no-build ${all:+--remove-orphans} "${services[@]}" || die "not all containers were started, see above; another run goes on from there"
    # A reply proves what answers requests; pod and tailscale alone are brought up before there is a model.
    if wants vllm-server || wants gateway; then
        for name in "${vllms[@]}"; do
            ready "$name" || follow "$name" "$since"
        done
        # Where nothing was asked for and nothing has changed, site.yml's own check is the proof.
        [[ -z $pull && $changed == 0 ]] || inside vllm-gemma python3 /usr/local/bin/test_connection.py --base-url http://127.0.0.1:8000/v1 \
            || die "the stack runs, but gave no reply, see above"
        [[ ! $all ]] || record
    fi
    echo "changed=$changed"
}

{
    cd "$(dirname "$(readlink -f "$0")")"
    # shellcheck source=server/standby.sh
    source ./standby.sh
    # shellcheck source=server/releases.sh
    source ./releases.sh
    trap '' HUP
    checkout=$(cd .. && pwd)
    if [[ " $* " =~ " --"(plan|pulled|build|settle|releases)" " ]]; then
        main "$@"
    else
        lock 'the run'
        main "$@" 2>&1 | tee -p .update.log 9>&-
    fi
    exit
}
