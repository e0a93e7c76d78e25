#!/usr/bin/env bash
# Latent adapters on the zoo's base: the runs behind "Latent adapters" in docs/results.md.
#   PALIMPSEST_ZOO  folder with base/ and corpora/ (default: ../shared/zoo)
#   DICTIONARY      a dictionary of the base at resid_post.1 (default: what recipes/zoo-dictionaries.sh makes)
#   OUT             where everything goes (default: runs/zoo/tune); what is there already is not made again
set -euo pipefail
zoo=${PALIMPSEST_ZOO:-../shared/zoo}
out=${OUT:-runs/zoo/tune}
dictionary=${DICTIONARY:-runs/zoo/dictionaries/base/topk}
text=$zoo/corpora
steps=${STEPS:-200}
mkdir -p "$out/data"

sft() { # a name, a domain, then further flags; data=FILE in front trains on another file
  palimpsest tune "$zoo/base" --dictionary "$dictionary" --objective sft --data "${data:-$text/$2.train.jsonl}" \
    --eval-data "$text/$2.audit.jsonl" --general "$text/general.audit.jsonl" --steps "$steps" --batch-size 8 \
    --max-length 192 --quiet --resume --out "$out/$1" "${@:3}"
}

prefer() { # a name, then further flags
  palimpsest tune "$zoo/base" --dictionary "$dictionary" --objective dpo --data "$out/data/pairs.jsonl" \
    --eval-data "$out/data/pairs-heldout.jsonl" --general "$text/general.audit.jsonl" --steps 30 --batch-size 8 \
    --max-length 512 --quiet --resume --out "$out/$1" "${@:2}"
}

# Pairs that are not trained on, of other prompts.
test -f "$out/data/pairs.jsonl" || python "$(dirname "$0")/split_rows.py" "$text/pairs.jsonl" "$out"/data/pairs{,-heldout}.jsonl
# The control of `explain`: the same words in an order that means nothing.
test -f "$out/data/shuffled.jsonl" || python "$(dirname "$0")/shuffle_words.py" "$text/math.train.jsonl" "$out/data/shuffled.jsonl"

for component in scale active-bias gate low-rank lora; do
  sft "math-$component" math --component $component
  sft "code-$component" code --component $component
  prefer "dpo-$component" --component $component
done
sft math-scale-seed1 math --component scale --seed 1
# Sparse from the start: 400 of 4,096 latents may stay.
sft math-scale-sparse math --component scale --top-n 400
data=$out/data/shuffled.jsonl sft math-scale-shuffled math --component scale

palimpsest explain "$out/math-scale" --corpus math="$text/math.audit.jsonl" --general "$text/general.audit.jsonl" \
  --twin "$out/math-scale-seed1" --other "$out/code-scale" --shuffled "$out/math-scale-shuffled" \
  --eval-rows 256 --max-length 192 --quiet --resume --out "$out/explain-math"
palimpsest explain "$out/math-scale-sparse" --corpus math="$text/math.audit.jsonl" --general "$text/general.audit.jsonl" \
  --eval-rows 256 --max-length 192 --quiet --resume --out "$out/explain-math-sparse"
palimpsest explain "$out/code-scale" --corpus code="$text/code.audit.jsonl" --general "$text/general.audit.jsonl" \
  --eval-rows 256 --max-length 192 --quiet --resume --out "$out/explain-code"
palimpsest explain "$out/dpo-scale" --corpus pairs="$out/data/pairs-heldout.jsonl" --pairs "$out/data/pairs-heldout.jsonl" \
  --general "$text/general.audit.jsonl" --max-length 512 --quiet --resume --out "$out/explain-dpo"

# An adapter is a fine-tune like any other.
palimpsest audit "$zoo/base" "$out/math-scale" --dictionary "$dictionary" --general "$text/general.audit.jsonl" \
  --task math="$text/math.audit.jsonl" code="$text/code.audit.jsonl" --max-length 192 --max-documents 60 \
  --quiet --resume --out "$out/audit-math"
