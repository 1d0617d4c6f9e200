#!/bin/sh
# From a file to an adapter with curl alone; see --help. docs/rest.md and /rest/v1/docs say more.
set -eu

usage() {
    cat <<END
usage: MINTWEB_API_KEY=tml-... $0 [FILE [FOLDER]]

Uploads FILE (default: the pirate questions beside this script), trains a LoRA adapter on it, shows the loss as it
falls, and unpacks the adapter (adapter_config.json, adapter_model.safetensors) into FOLDER (default: adapter).

Environment:
  MINTWEB_URL         where mintweb is (default: http://127.0.0.1:8000)
  MINTWEB_API_KEY     a key, made on the settings page or printed by \`make up\`
  MINTWEB_MODEL       the base model (default: the first that is offered)
  MINTWEB_STEPS       how many steps to train (default: 60)
END
}

fail() {
    echo "$0: $*" >&2
    exit 1
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
-*)
    usage >&2
    exit 2
    ;;
esac

file=${1:-$(dirname "$0")/data/pirate_qa.jsonl}
folder=${2:-adapter}
rest=${MINTWEB_URL:-http://127.0.0.1:8000}/rest/v1
steps=${MINTWEB_STEPS:-60}
[ -n "${MINTWEB_API_KEY:-}" ] || fail "set MINTWEB_API_KEY to a key of yours"
[ -f "$file" ] || fail "there is no file $file"
for program in curl python3 tar; do
    command -v "$program" >/dev/null || fail "$program is needed"
done

answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

# field PATH: print a value of the last answer, as field error.message
field() {
    python3 -c '
import json, sys
value = json.load(open(sys.argv[1], encoding="utf-8"))
for name in sys.argv[2].split("."):
    value = value[int(name)] if isinstance(value, list) else value[name]
print("" if value is None else value)' "$answer" "$1"
}

# call METHOD PATH [curl options]: send a request; what is refused ends the script with the reason
call() {
    method=$1 path=$2
    shift 2
    status=$(curl -sS --retry 5 --retry-connrefused -X "$method" -H "X-API-Key: $MINTWEB_API_KEY" \
        -o "$answer" -w '%{http_code}' "$@" "$rest$path") || fail "no answer from $rest"
    case "$status" in
    2??) ;;
    *) fail "$method $path: $status $(field error.place 2>/dev/null) $(field error.message 2>/dev/null || cat "$answer")" ;;
    esac
}

call GET /base-models
model=${MINTWEB_MODEL:-$(field items.0.name)}

echo "uploading $file"
call POST /datasets -F "file=@\"$file\""
dataset=$(field id) number=$(field version.number)
state=checking
while [ "$state" = checking ]; do
    call GET "/datasets/$dataset/versions/$number?wait_s=30"
    state=$(field state)
done
[ "$state" = ready ] || fail "the dataset is $state: $(field error) - see ${rest%/rest/v1}/datasets/$dataset/"
echo "$(field num_rows) rows of the kind $(field kind)"

# The key makes it safe to send this again when the answer was lost: it starts one run.
call POST /runs -H "Idempotency-Key: quickstart-$$-$(date +%s)" -H 'Content-Type: application/json' -d "{
    \"base_model\": \"$model\", \"dataset\": \"$dataset@$number\", \"num_steps\": $steps, \"name\": \"quickstart\"
}"
run=$(field id)
echo "run $run: ${rest%/rest/v1}/runs/$run/"

over=False phase=
while [ "$over" = False ]; do
    sleep 1
    call GET "/runs/$run"
    loss=$(field loss)
    call GET "/runs/$run/status"
    over=$(field is_over)
    if [ "$(field phase)" != "$phase" ]; then
        phase=$(field phase)
        echo "$phase${loss:+, loss $loss}"
    fi
done
[ "$(field state)" = finished ] || fail "the run is $(field state): $(field phase)"

call GET "/runs/$run/checkpoints/weights/final"
mkdir -p "$folder"
curl -sSf -H "X-API-Key: $MINTWEB_API_KEY" "$rest/runs/$run/checkpoints/weights/final/download" | tar -x -C "$folder"
echo "the adapter is in $folder:"
ls -l "$folder"
