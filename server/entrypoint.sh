#!/bin/bash
# Fetches the base model and serves it with vLLM.
#   entrypoint.sh         serve; without a model wait for one, unhealthy, saying what is missing
#   entrypoint.sh fetch   only fetch: exit 0 when a complete copy is there, else 1 and the reason
#   entrypoint.sh CMD…    run CMD
# Every SERVER_ setting has its default here; entrypoint.env overrides it.
set -euo pipefail
umask 0007

SERVER_MODEL=${SERVER_MODEL:-google/functiongemma-270m-it}
SERVER_MODEL_REVISION=${SERVER_MODEL_REVISION:-main}
SERVER_MODEL_ALIASES=${SERVER_MODEL_ALIASES:-}     # other names by which an adapter may call this base
SERVER_MAX_LORAS=${SERVER_MAX_LORAS:-8}            # adapters in one batch
# Adapters in memory: at least twice the declared ones, so that each new generation fits beside its old one.
# A high figure costs nothing: vLLM reserves no memory for those that are not loaded.
SERVER_MAX_CPU_LORAS=${SERVER_MAX_CPU_LORAS:-256}
SERVER_MAX_LORA_RANK=${SERVER_MAX_LORA_RANK:-32}
SERVER_MAX_MODEL_LEN=${SERVER_MAX_MODEL_LEN:-4096} # tokens of prompt and answer
SERVER_DTYPE=${SERVER_DTYPE:-bfloat16}
SERVER_KVCACHE_SPACE=${SERVER_KVCACHE_SPACE:-1}    # GiB, on the CPU
SERVER_EXTRA_ARGS=${SERVER_EXTRA_ARGS:-}           # more of vLLM's arguments
SERVER_SOCKET=${SERVER_SOCKET:-}                   # unset: TCP, port 8000

store=/models/base
model_dir=$store/$SERVER_MODEL
wanted="$SERVER_MODEL@$SERVER_MODEL_REVISION"
token=/run/secrets/huggingface/token
# Beside the socket, by its name: several vLLMs may have theirs in one directory.
waiting=${SERVER_SOCKET:+${SERVER_SOCKET%.sock}.waiting}  # what healthcheck.py says before vLLM listens
base=/run/vllm/vllm.base                                  # what the served base model expects of an adapter
[[ -z $SERVER_SOCKET ]] || base=${SERVER_SOCKET%.sock}.base

say() { echo "entrypoint.sh: $*"; }

complete() { [[ $(cat "$model_dir/.complete" 2>/dev/null) == "$wanted" ]]; }

# Downloads into a directory beside the served one and renames it when it is whole: what serves now stays as it is.
download() {
    local part=$store/.partial output
    export HF_HOME=/models/cache/huggingface HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_TELEMETRY=1 NO_COLOR=1
    [[ -z ${SERVER_HF_ENDPOINT:-} ]] || export HF_ENDPOINT=$SERVER_HF_ENDPOINT
    [[ ! -r $token ]] || export HF_TOKEN_PATH=$token
    [[ $(cat "$part/.wanted" 2>/dev/null) == "$wanted" ]] || rm -rf "$part"
    mkdir -p "$part"
    echo "$wanted" >"$part/.wanted"
    [[ -n ${said-} ]] || say "fetching $wanted from ${HF_ENDPOINT:-the Hugging Face Hub}" >&2
    # `hf download` alone is content with what an earlier try left when the hub does not answer.
    if ! output=$(hf models info "$SERVER_MODEL" --revision "$SERVER_MODEL_REVISION" 2>&1 \
        && hf download "$SERVER_MODEL" --revision "$SERVER_MODEL_REVISION" --local-dir "$part" 2>&1); then
        reason "$output"
        return 1
    fi
    echo "$wanted" >"$part/.complete"
    sync -f "$part"
    mkdir -p "${model_dir%/*}"
    rm -rf "$store/.old"
    [[ ! -e $model_dir ]] || mv "$model_dir" "$store/.old"
    mv "$part" "$model_dir"
    rm -rf "$store/.old"
}

# One line: why there is no model, and what mends it.
reason() {
    local error mend again="then server/update.sh --no-pull vllm-server"
    local put="sudo install -D -m 0400 -o 10001 -g 10000 TOKENFILE server/secrets/huggingface/token"
    error=$(grep -m1 -o 'Error: .*' <<<"$1" || tail -n1 <<<"$1")
    error=${error#Error: } error=${error//$'\e[0m'/}
    case $error in
    Revision*' not found'*)
        mend="name a revision that exists as SERVER_MODEL_REVISION in server/entrypoint.env, $again" ;;
    *"'$SERVER_MODEL' not found"*)
        mend="name a model that exists (and that the token may read) as SERVER_MODEL in server/entrypoint.env, $again" ;;
    *denied* | *'requires approval'* | *401* | *403*)
        mend="accept the licence at https://huggingface.co/$SERVER_MODEL, make a read token, and: $put" ;;
    *)
        mend="it is tried again every minute; see whether this host gets through: curl -I ${SERVER_HF_ENDPOINT:-https://huggingface.co}" ;;
    esac
    if [[ -e $token && ! -r $token ]]; then
        error="uid 10001 cannot read server/secrets/huggingface/token"
        mend="sudo chown 10001:10000 server/secrets/huggingface/token"
    fi
    say "no model $wanted: ${error%.}. To mend it: $mend"
}

# Whole or not at all: an adapter is checked against it by other processes.
describe_base() {
    local name
    for name in SERVER_MODEL SERVER_MODEL_REVISION SERVER_MODEL_ALIASES SERVER_DTYPE SERVER_MAX_LORA_RANK SERVER_MAX_CPU_LORAS; do
        echo "$name=${!name}"
    done >"$base.new"
    echo "MODEL_DIR=$model_dir" >>"$base.new"
    mv "$base.new" "$base"
}

# Under a lock, because update.sh fetches in a container of its own.
fetch() {
    complete && return
    (
        flock 8
        complete || download
    ) 8>"$store/.lock"
}

# What the token file is now; changes when somebody puts a token there.
token_state() { stat -c '%Y %s %u' "$token" 2>/dev/null || true; }

serve() {
    trap 'exit 0' TERM INT
    rm -f ${waiting:+"$waiting"} "$base"
    local said='' line before
    until line=$(fetch); do
        [[ $line == "$said" ]] || echo "$line"
        said=$line
        [[ -z $waiting ]] || echo "${line#*: }" >"$waiting"
        before=$(token_state)
        for _ in {1..12}; do
            sleep 5 &
            wait $!
            [[ $(token_state) == "$before" ]] || break
        done
    done
    [[ -z $waiting ]] || echo "loading $wanted" >"$waiting"

    local url extra args=(
        --served-model-name "$SERVER_MODEL"
        --dtype "$SERVER_DTYPE"
        --max-model-len "$SERVER_MAX_MODEL_LEN"
        --enable-prefix-caching
        --enable-lora
        --max-loras "$SERVER_MAX_LORAS"
        --max-cpu-loras "$SERVER_MAX_CPU_LORAS"
        --max-lora-rank "$SERVER_MAX_LORA_RANK"
        --enable-auto-tool-choice --tool-call-parser functiongemma
        --enable-request-id-headers
        --disable-fastapi-docs
    )
    [[ ! -v GATEWAY_LONGEST_REQUEST ]] || args+=(--shutdown-timeout "${GATEWAY_LONGEST_REQUEST%s}")
    # Multi-LoRA without the plugin: name the adapters here, and leave VLLM_PLUGINS unset below. A bad one ends the start.
    # args+=(--lora-modules
    #     lint=/models/adapters/lint
    #     docstring=/models/adapters/docstring
    # )
    if [[ -n $SERVER_SOCKET ]]; then
        rm -f "$SERVER_SOCKET"  # vLLM leaves it behind and would not bind over it
        args+=(--uds "$SERVER_SOCKET")
        # Of these the gateway's log has who asked; here stays what came past it, to the routes for administrators.
        args+=(--disable-access-log-for-endpoints "/ready,/gateway/metrics,/v1/models,/v1/chat/completions,/v1/completions")
        url="http://function-gemma-server:8000/v1, through the gateway and $SERVER_SOCKET"
    else
        args+=(--host 0.0.0.0 --port 8000)
        url="http://0.0.0.0:8000/v1"
    fi
    read -ra extra <<<"$SERVER_EXTRA_ARGS"
    say "base model: $wanted from $model_dir"
    say "serving it at $url"
    export SERVER_MODEL SERVER_MODEL_REVISION  # the plugin names them in replies
    export VLLM_PLUGINS=function_gemma HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=$SERVER_KVCACHE_SPACE
    # Last, so that no setting switches them on: vLLM's own loading of adapters would bypass their admission, and a second API server
    # would give the ids of the first to other adapters.
    export VLLM_ALLOW_RUNTIME_LORA_UPDATING=0
    # On CPUs the engine computes by itself. A worker beside it, vLLM's default there, starts a third later and keeps a core busy
    # while there are requests. As with it, one core is left to the rest.
    if python3 -c 'from importlib.metadata import version; exit("cpu" not in version("vllm"))' 2>/dev/null; then
        export VLLM_ENABLE_V1_MULTIPROCESSING=${VLLM_ENABLE_V1_MULTIPROCESSING:-0}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc --ignore 1)}
    fi
    describe_base
    exec vllm serve "$model_dir" "${args[@]}" "${extra[@]}" --api-server-count 1
}

case ${1-serve} in
serve) serve ;;
fetch) fetch ;;
*) exec "$@" ;;
esac
