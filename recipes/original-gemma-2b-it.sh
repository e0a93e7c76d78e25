#!/usr/bin/env bash
# The original's audit of google/gemma-2b-it. NOT RUN: it needs a hub, a GPU, a fine-tune and text.
#   TUNED       a fine-tune of google/gemma-2b-it: a folder, an adapter or a hub id
#   DICTIONARY  a folder of SAELens release gemma-2b-it-res-jb, id blocks.12.hook_resid_post
#   GENERAL     JSONL with "messages" rows; the original used general instructions, 700 rows
#   TASKS       NAME=FILE …, the original's were math, reasoning, empathy, Chinese and safety, 700 rows each, never published
set -euo pipefail
: "${TUNED:?}" "${DICTIONARY:?}" "${GENERAL:?}" "${TASKS:?}"
# --legacy, k = 5 and 100 characters of each answer are the original's figures; leave --legacy out for the corrected ones.
# shellcheck disable=SC2086
palimpsest audit google/gemma-2b-it "$TUNED" --dictionary "$DICTIONARY" --site resid_post.12 --dtype bfloat16 \
  --general "$GENERAL" --task $TASKS --max-documents 700 --answer-chars 100 --legacy --controls \
  --out "runs/original-gemma-2b-it"
