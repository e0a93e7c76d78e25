#!/usr/bin/env bash
# Make and calibrate the zoo's battery and audit every fine-tune with it: the runs behind the verdicts in docs/results.md.
# The dictionary is the one that recipes/zoo.sh trains.
#   PALIMPSEST_ZOO  folder with base/, the fine-tunes and corpora/ (default: ../shared/zoo)
#   OUT             where the dictionary is and the rest goes (default: runs/zoo)
set -euo pipefail
zoo=${PALIMPSEST_ZOO:-../shared/zoo}
out=${OUT:-runs/zoo}
text=$zoo/corpora
battery=$out/battery
palimpsest battery make --base "$zoo/base" --dictionary "$out/dictionary" --general "$text/general.audit.jsonl" \
  --task "web=$text/web.audit.jsonl" "math=$text/math.audit.jsonl" "code=$text/code.audit.jsonl" \
  --max-length 192 --tokens 8k --set-aside 0 --keep-activations --controls --resume --out "$battery"
palimpsest battery calibrate "$battery" --nulls 24 --kl \
  --null-corpus "general=$text/general.train.jsonl" "web=$text/web.train.jsonl" "math=$text/math.train.jsonl" \
  "code=$text/code.train.jsonl"
for run in math:math code:code math-lora:math math-mixed:math code-gentle:code general:general math-step25:math \
  math-step75:math; do
  palimpsest audit "$zoo/base" "$zoo/${run%%:*}" --battery "$battery" --declared "${run##*:}" --resume \
    --out "$out/verdict-${run%%:*}"
done
