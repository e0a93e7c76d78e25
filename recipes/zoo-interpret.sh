#!/usr/bin/env bash
# From a verdict to the latents behind it, on the zoo: examples in both models, labels with scores, one latent steered, one page.
# Needs recipes/zoo.sh and recipes/zoo-battery.sh (the audit and its dictionary); zoo-diff.sh adds a diff to the page.
# About four minutes on two cores.
#   ZOO=../shared/zoo RUNS=runs/zoo bash recipes/zoo-interpret.sh
set -euo pipefail
ZOO=${ZOO:-../shared/zoo}
RUNS=${RUNS:-runs/zoo}
TEXT=$ZOO/corpora
OUT=${OUT:-$RUNS/interpret}

for name in math code; do
    palimpsest examples "$ZOO/base" "$ZOO/$name" --dictionary "$RUNS/dictionary" --resume --out "$OUT/examples-$name" \
        --corpus general="$TEXT/general.audit.jsonl" web="$TEXT/web.audit.jsonl" math="$TEXT/math.audit.jsonl" code="$TEXT/code.audit.jsonl"
    palimpsest label "$OUT/examples-$name" --provider tokens --top 500 --resume --out "$OUT/labels-$name"
done

# Latent 1242 of this dictionary promotes " $", "=$", " paid": turned up in the base, does it write what the fine-tune writes?
palimpsest steer "$ZOO/base" "$ZOO/math" --dictionary "$RUNS/dictionary" --latent 1242:add=15 --side base --resume --out "$OUT/steer-math" \
    --prompt "Once upon a time there was a" "The farmer has" "The best way to learn is" --watch " \$" " hours" \
    --sweep 0.5 1 2 4 --corpus "$TEXT/general.audit.jsonl" --sweep-tokens 10k

palimpsest report "$RUNS/verdict-math" "$OUT/examples-math" "$OUT/labels-math" "$OUT/steer-math" --overwrite --out "$OUT/report-math"
echo "Open $OUT/report-math/report.html, or: palimpsest serve $RUNS --model"
