#!/usr/bin/env bash
# Preference tuning of Gemma-2-2B through the latents of a Matryoshka dictionary at layer 20, with the settings of the
# ISaeRFT prototype (LessWrong, xZkBDAgQGqm6tvCvy): IA3 on latents, DPO with beta 0.1, batch 4 x 16, 30 steps, learning rates
# 5e-4 to 1e-1. NOT RUN: it needs the hub, the licence of the model and a GPU (the `trl` and `sae-lens` extras, too).
#   PAIRS, HELD   preference pairs to train on and held out: `prompt`, `chosen`, `rejected` (the prototype:
#                 trl-internal-testing/hh-rlhf-helpful-base-trl-style); the base has no chat template, so give text
#   GENERAL       general text, for the divergence from the base
set -euo pipefail
out=${OUT:-runs/gemma-2-2b-tune}
palimpsest tune sweep google/gemma-2-2b \
  --dictionary gemma-2-2b-res-matryoshka-dc/blocks.20.hook_resid_post --component scale \
  --objective dpo --beta 0.1 --data "${PAIRS:?}" --eval-data "${HELD:?}" --general "${GENERAL:?}" \
  --lrs 5e-4 2e-3 1e-2 3e-2 1e-1 --steps 30 --batch-size 4 --accumulate 16 --max-length 512 \
  --dtype bfloat16 --precision bfloat16 --resume --out "$out/sweep"
best=$(python -c "import json, sys; lines = json.load(open(sys.argv[1]))['lines']; print(next(x['name'] for x in lines if x['best']))" \
  "$out/sweep/leaderboard.json")
# Labels come from Neuronpedia, where the dictionary has an id there.
palimpsest explain "$out/sweep/$best" --corpus "${HELD:?}" --general "${GENERAL:?}" --dtype bfloat16 --resume --out "$out/explain"
