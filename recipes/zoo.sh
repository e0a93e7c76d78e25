#!/usr/bin/env bash
# Train an SAE on the zoo's base and audit every fine-tune there: the runs behind docs/results.md.
#   PALIMPSEST_ZOO  folder with base/, the fine-tunes and corpora/ (default: ../shared/zoo)
#   OUT             where the dictionary and the audits go (default: runs/zoo)
set -euo pipefail
zoo=${PALIMPSEST_ZOO:-../shared/zoo}
out=${OUT:-runs/zoo}
text=$zoo/corpora
palimpsest train sae --model "$zoo/base" --site resid_post.1 --latents 4096 --k 32 --tokens 2M \
  --corpus "$text/general.train.jsonl" "$text/web.train.jsonl" "$text/math.train.jsonl" "$text/code.train.jsonl" \
  --resume --out "$out/dictionary"
for tuned in math code math-lora math-mixed code-gentle general math-step25 math-step75; do
  palimpsest audit "$zoo/base" "$zoo/$tuned" --dictionary "$out/dictionary" \
    --general "$text/general.audit.jsonl" \
    --task "math=$text/math.audit.jsonl" "code=$text/code.audit.jsonl" "web=$text/web.audit.jsonl" \
    --max-length 192 --max-documents 200 --kl --controls --resume --out "$out/$tuned"
done
palimpsest audit "$zoo/base" "$zoo/math" --dictionary "$out/dictionary" --general "$text/general.audit.jsonl" \
  --task "math=$text/math.audit.jsonl" "code=$text/code.audit.jsonl" --max-length 192 --max-documents 200 \
  --legacy --resume --out "$out/math-legacy"
