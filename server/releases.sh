# Sourced by update.sh: the releases that served, each on record in .releases/NUMBER, with the settings that it had.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # update.sh's variables
releases=.releases

numbers() { (cd "$releases" 2>/dev/null && find . -maxdepth 1 -name '[0-9]*' -printf '%P\n' || true) | sort -n; }

serving() { cat "$releases/serving" 2>/dev/null; }

on_record() { sed -n "s/^$2 //p" "$releases/$1/release"; }

# The settings' files, of one host; where .env has the tags of images as well, they are no settings.
settings_files() { find . -maxdepth 1 -type f \( -name '*.env' -o -name docker-compose.gpus.yml \) -printf '%P\n' | LC_ALL=C sort; }

settings_hash() {
    local file
    settings_files | while read -r file; do
        echo "$file"
        sed '/^[A-Z_]*_TAG=/d' "$file"
    done | sha256sum | cut -c1-12
}

code_and_settings() { echo "commit $(git_ rev-parse HEAD 2>/dev/null)" && echo "settings $(settings_hash)"; }

# What makes two releases the same.
release() {
    local image
    code_and_settings
    compose config --images | sort -u | while read -r image; do
        echo "image $image $(docker image inspect -f '{{.Id}}' "$image" 2>/dev/null)"
    done
}

# They come and go without an update: noted of a release when it is there, and again before another takes its place.
note_adapters() { inside vllm-gemma adapter_manager.py list 2>/dev/null | sed -n '/  /s/^/adapter /p' >"$releases/$1/adapters" || true; }

# Puts what serves on record, under a number that is higher than what served before. Called once all of it has given a reply.
record() {
    local now number same='' next
    [[ ! $(git_ status --porcelain --untracked-files=no 2>&1) ]] || return 0  # a commit does not say what this is; or there is no git
    now=$(release)
    for number in $(numbers); do
        [[ $(grep -E '^(commit|settings|image) ' "$releases/$number/release") != "$now" ]] || same=$number
    done
    next=$(($(numbers | tail -n1) + 1))
    if [[ ! $same ]]; then
        rm -rf "$releases/new"
        (umask 077 && mkdir -p "$releases/new/settings")
        settings_files | xargs -r cp -p -t "$releases/new/settings"
        { echo "$now" && echo "time $(date '+%F %T %Z')"; } >"$releases/new/release"
        same=new
    fi
    if [[ $same != "$(serving)" ]]; then
        git_ update-ref "refs/releases/$next" HEAD  # git keeps the commit
        mv "$releases/$same" "$releases/$next"
        note_adapters "$next"
        echo "$next" >"$releases/serving.new"
        mv "$releases/serving.new" "$releases/serving"
        say "release $next is on record"
        forget
    fi
}

# Releases before the last few, and images that no release on record has.
forget() {
    local number image kept
    kept=$(sed -nE "s/^UPDATE_RELEASES_KEPT=['\"]?([0-9]+).*/\1/p" .env)
    for number in $(numbers | head -n "-${kept:-3}"); do
        rm -rf "${releases:?}/$number"
        say "release $number is on record no more"
    done
    for number in $(git_ for-each-ref --format='%(refname:lstrip=2)' refs/releases); do
        [[ -e $releases/$number ]] || git_ update-ref -d "refs/releases/$number"
    done
    for image in $(docker image ls --format '{{.Repository}}:{{.Tag}}' --filter 'reference=vllm-gemma' --filter 'reference=tailscale-vllm'); do
        grep -qsF "image $image " "$releases"/*/release || docker image rm "$image" >/dev/null 2>&1 || true
    done
}

list_releases() {
    local number
    for number in $(numbers); do
        [[ $number == "$(serving)" ]] && echo "release $number, which serves" || echo "release $number"
        cat "$releases/$number/release" "$releases/$number/adapters" | sed 's/^/  /'
    done
}

# Whether code and settings are others than those that served last.
differs() { [[ $(serving) && $(grep -E '^(commit|settings) ' "$releases/$(serving)/release") != "$(code_and_settings)" ]]; }

# Where an update has failed that is what serves.
former() {
    if differs; then
        serving
    else
        numbers | awk -v serving="$(serving)" '$1 < serving' | tail -n1
    fi
}

# Sets `changed`. Code and settings become those of a release; replacing what runs is its own update.sh's to do.
go_back() {
    local to=$1 commit
    [[ $to != former ]] || to=$(former)
    [[ $to ]] || die "no release before this one is on record: server/update.sh --releases"
    [[ -e $releases/$to/release ]] || die "there is no release $to on record, but $(numbers | xargs): server/update.sh --releases"
    commit=$(on_record "$to" commit)
    if [[ $plan ]]; then
        say "would go back to release $to of $(on_record "$to" time), commit ${commit:0:12}"
        changed=1
        return
    fi
    git_ reset --quiet --keep "$commit" || die "nothing has changed: the checkout has changes of its own, see above. git -C $checkout status shows them, git -C $checkout stash puts them aside"
    settings_files | xargs -r rm -f
    cp -rp "$releases/$to/settings/." .
    say "back to release $to, commit ${commit:0:12}"
    # A release from before this word replaces a sidecar that differs unasked.
    grep -q -e --sidecar update.sh || sidecar=''
    exec "$checkout/server/update.sh" --pulled ${sidecar:+--sidecar}
}
