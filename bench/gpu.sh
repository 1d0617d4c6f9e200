#!/bin/sh
# The engine beside transformers and PEFT on a GPU: Qwen3-0.6B and Qwen3-4B with random weights, bf16.
# Needs torch, transformers and PEFT; no network, no database. Tables, results and a picture go to $OUT, or bench/out.
# $BUDGET_S (400) bounds the measuring, with some 40 s more for the rest: where time is short there are fewer rounds,
# then fewer measures.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-bench/out}
PYTHON=${PYTHON:-python3}
BUDGET_S=${BUDGET_S:-400}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-qwen3-0.6b}
LARGE=${LARGE:-qwen3-4b}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
failed=0

measure() { # share of the budget in percent, model shape, options
    budget=$((BUDGET_S * $1 / 100)) shape=$2
    shift 2
    timeout $((budget + 40)) "$PYTHON" -m bench.engine_bench --shape "$shape" --device "$DEVICE" --dtype bfloat16 \
        --budget-s "$budget" --output "$OUT/$shape.json" "$@" >"$OUT/$shape.md" || failed=1
    cat "$OUT/$shape.md"
}

measure 60 "$SMALL" --rounds 5 --tokens 60 230 1000
measure 25 "$LARGE" --rounds 3 --sequences 8 --runs 1 8 --tokens 230 1000
for shape in "$SMALL" "$LARGE"; do
    if [ -f "$OUT/$shape.json" ]; then
        "$PYTHON" -m bench.curves "$OUT/$shape.json" --output "$OUT/$shape.png" || failed=1
    fi
done
exit $failed
