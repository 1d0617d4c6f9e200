#!/usr/bin/env bash
# Creates the two client environments of the SDK tests beside the project's own:
#   .venv-mint022   the published mint client, over tinker 0.22.0
#   .venv-tinker038 tinker 0.38.0
# Tests put sdk/src on PYTHONPATH to try this project's mint package in either.
# A second run does nothing: each environment keeps the list that it was made from.
# A changed list makes the environment anew. PYTHON names the interpreter (default: python3).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="${PYTHON:-python3}"

make_env() {
    local env="$root/.venv-$1" wanted="$here/requirements-$1.txt"
    if cmp -s "$wanted" "$env/requirements.stamp" && [ -x "$env/bin/python" ]; then
        return
    fi
    echo "making .venv-$1"
    rm -rf "$env"
    "$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted"
    # Last, so that an interrupted run is started over.
    cp "$wanted" "$env/requirements.stamp"
}

make_env mint022
make_env tinker038
