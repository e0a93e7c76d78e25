#!/usr/bin/env bash
# Dictionaries of every view and rule on one pair of the zoo: the runs behind the table of dictionaries in docs/results.md.
#   PALIMPSEST_ZOO  folder with base/, math/ and corpora/ (default: ../shared/zoo)
#   OUT             where store, dictionaries and evaluations go (default: runs/zoo/dictionaries)
set -euo pipefail
zoo=${PALIMPSEST_ZOO:-../shared/zoo}
out=${OUT:-runs/zoo/dictionaries}
text=$zoo/corpora
train=("$text"/{general,web,math,code}.train.jsonl)
audit=("$text"/{general,web,math,code}.audit.jsonl)
site=resid_post.1
palimpsest harvest "$zoo/base" --tuned "$zoo/math" --site $site --corpus "${train[@]}" --max-length 256 \
  --resume --out "$out/store"
size=(--latents 4096 --k 32 --tokens 2M --log-every 200 --resume)
held=(--eval-corpus "${audit[@]}" --eval-tokens 20k --max-length 192)
base=(--store "$out/store" --model "$zoo/base" --site $site "${held[@]}")
pair=(--store "$out/store" --base "$zoo/base" --tuned "$zoo/math" --site $site "${held[@]}")
# Several dictionaries on one stream, each in a folder of its own.
palimpsest train sae "${base[@]}" "${size[@]}" --out "$out/base" \
  --variant topk:activation=topk batch_topk:activation=batch_topk matryoshka:activation=batch_topk,prefixes=256+1024+4096
palimpsest train sae "${base[@]}" --latents 4096 --k 32 --tokens 300k --resume --out "$out/base-penalised" \
  --variant relu:activation=relu,sparsity-weight=0.05 jumprelu:activation=jumprelu,sparsity-weight=2
palimpsest train sae --store "$out/store" --model "$zoo/math" --side tuned --site $site "${held[@]}" "${size[@]}" --out "$out/tuned" \
  --activation batch_topk
palimpsest train diff-sae "${pair[@]}" "${size[@]}" --out "$out/diff" --activation batch_topk
palimpsest train crosscoder "${pair[@]}" "${size[@]}" --out "$out/crosscoder" \
  --variant topk:activation=topk batch_topk:activation=batch_topk bound:activation=batch_topk,tuned_only=64,shared=256
