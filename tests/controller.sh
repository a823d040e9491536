#!/bin/sh
# Makes .venv with what requirements.txt names; does nothing when it is there.
set -eu
cd "$(dirname "$0")/.."
key=$(sha256sum requirements.txt | cut -d' ' -f1)
[ "$(cat .venv/.key 2>/dev/null)" != "$key" ] || exit 0
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "controller: python3 is $(python3 -V), 3.11 or newer is needed" >&2
    exit 1
fi
if ! python3 -c 'import ensurepip' 2>/dev/null; then
    echo "controller: installing python3-venv" >&2
    $([ "$(id -u)" = 0 ] || echo sudo) apt-get install -y --no-install-recommends python3-venv
fi
python3 -m venv --clear .venv
# uv first: it installs the rest several times faster than pip.
.venv/bin/pip install -q --disable-pip-version-check --require-hashes --no-deps -r /dev/stdin <<EOF
$(sed -n '/^uv==/,/^[^ ]/{/^uv==/p;/^ /p}' requirements.txt)
EOF
.venv/bin/uv pip install -q --python .venv/bin/python --require-hashes -r requirements.txt
echo "$key" > .venv/.key
