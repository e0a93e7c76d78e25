#!/usr/bin/env bash
# The original's audit of Qwen/Qwen1.5-0.5B-Chat. NOT RUN: it needs a hub, a GPU, a fine-tune and text.
#   TUNED       a fine-tune of Qwen/Qwen1.5-0.5B-Chat: a folder, an adapter or a hub id
#   DICTIONARY  a folder of the release of Kissane et al., sae_qwen1.5-0.5b-chat_blocks.13.hook_resid_pre_32768
#   GENERAL     JSONL with "messages" rows; the original used general instructions, 700 rows
#   TASKS       NAME=FILE …, the original's were math, reasoning, empathy, Chinese and safety, 700 rows each, never published
set -euo pipefail
: "${TUNED:?}" "${DICTIONARY:?}" "${GENERAL:?}" "${TASKS:?}"
# --legacy, k = 5 and 100 characters of each answer are the original's figures; leave --legacy out for the corrected ones.
# shellcheck disable=SC2086
palimpsest audit Qwen/Qwen1.5-0.5B-Chat "$TUNED" --dictionary "$DICTIONARY" --site resid_pre.13 --dtype bfloat16 \
  --general "$GENERAL" --task $TASKS --max-documents 700 --answer-chars 100 --legacy --controls \
  --out "runs/original-qwen1.5-0.5b-chat"
