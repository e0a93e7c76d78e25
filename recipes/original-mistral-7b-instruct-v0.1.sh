#!/usr/bin/env bash
# The original's audit of mistralai/Mistral-7B-Instruct-v0.1. NOT RUN: it needs a hub, a GPU, a fine-tune and text.
#   TUNED       a fine-tune of mistralai/Mistral-7B-Instruct-v0.1: a folder, an adapter or a hub id
#   DICTIONARY  a folder of SAELens release mistral-7b-res-wg, id blocks.16.hook_resid_pre (trained on the base Mistral)
#   GENERAL     JSONL with "messages" rows; the original used general instructions, 700 rows
#   TASKS       NAME=FILE …, the original's were math, reasoning, empathy, Chinese and safety, 700 rows each, never published
set -euo pipefail
: "${TUNED:?}" "${DICTIONARY:?}" "${GENERAL:?}" "${TASKS:?}"
# --legacy, k = 5 and 100 characters of each answer are the original's figures; leave --legacy out for the corrected ones.
# shellcheck disable=SC2086
palimpsest audit mistralai/Mistral-7B-Instruct-v0.1 "$TUNED" --dictionary "$DICTIONARY" --site resid_pre.16 --dtype bfloat16 \
  --general "$GENERAL" --task $TASKS --max-documents 700 --answer-chars 100 --legacy --controls \
  --out "runs/original-mistral-7b-instruct-v0.1"
