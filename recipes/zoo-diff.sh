#!/usr/bin/env bash
# Five methods on four pairs of the zoo and on three null pairs: the runs behind "Diffs" in docs/results.md.
#   PALIMPSEST_ZOO  folder with base/, math/, … and corpora/ (default: ../shared/zoo)
#   OUT             where everything goes (default: runs/zoo/diff); what is there already is not made again
set -euo pipefail
zoo=${PALIMPSEST_ZOO:-../shared/zoo}
out=${OUT:-runs/zoo/diff}
text=$zoo/corpora
train=("$text"/{general,web,math,code}.train.jsonl)
audit=("$text"/{general,web,math,code}.audit.jsonl)
site=resid_post.1
recipe=(--site $site --corpus "${train[@]}" --latents 2048 --k 32 --tokens 1M --log-every 200 --resume)
l1=activation=relu,sparsity-weight=0.1
btk=activation=batch_topk

# Null pairs: a random change of the same drift, and a control fine-tune on text that the base knows (zoo/general).
palimpsest diff null "$zoo/base" "$zoo/math" --site $site --corpus "${train[@]}" --resume --out "$out/models/random-math"
# A pair whose truth is known: one new direction, written on tokens that hold a digit.
test -d "$out/models/planted" || python "$(dirname "$0")/plant_direction.py" "$zoo/base" "$text"/{general,math,code}.train.jsonl \
  --out "$out/models/planted"

model_of() { case $1 in random-math | planted) echo "$out/models/$1" ;; *) echo "$zoo/$1" ;; esac; }

train_pair() { # a pair, then whether every dictionary gets a twin with another seed
  local name=$1 tuned twins=()
  tuned=$(model_of "$name")
  if [ "$2" = twins ]; then twins=(l1-twin:$l1,seed=1 batch_topk-twin:$btk,seed=1 twin:$btk,seed=1); fi
  palimpsest train crosscoder --base "$zoo/base" --tuned "$tuned" "${recipe[@]}" --out "$out/$name/crosscoder" \
    --variant l1:$l1 batch_topk:$btk "${twins[@]:0:2}"
  palimpsest train diff-sae --base "$zoo/base" --tuned "$tuned" "${recipe[@]}" --out "$out/$name/diff" \
    --variant first:$btk "${twins[@]:2}"
  local source=(--model "$tuned" "${recipe[@]}")
  if [ "$name" = math-lora ]; then # an adapter is no model by itself: its activations come from a store of the pair
    palimpsest harvest "$zoo/base" --tuned "$tuned" --site $site --corpus "${train[@]}" --max-length 256 --resume --out "$out/$name/store"
    source=(--store "$out/$name/store" --site $site --latents 2048 --k 32 --tokens 1M --log-every 200 --resume)
  fi
  palimpsest train sae "${source[@]}" --side tuned --out "$out/$name/tuned" --variant first:$btk "${twins[@]:2}"
}

diff_pair() { # a pair, then further flags
  local name=$1 method folder twin nulls
  for method in crosscoder/l1 crosscoder/batch_topk diff/first tuned/first base/first; do
    folder=$out/$name/$method twin=() nulls=()
    if [ $method = base/first ]; then folder=$out/base/first; fi
    case $name in general | random-math) ;; *) nulls=(--null "$out"/{general,random-math}/diff-${method//\//-}) ;; esac
    if [ -d "$folder-twin" ]; then twin=(--twin "$folder-twin"); fi
    if [ "${folder%/first}" != "$folder" ] && [ -d "${folder%first}twin" ]; then twin=(--twin "${folder%first}twin"); fi
    palimpsest diff "$zoo/base" "$(model_of "$name")" --dictionary "$folder" --corpus "${audit[@]}" "${read_with[@]}" \
      "${nulls[@]}" "${twin[@]}" "${@:2}" --quiet --out "$out/$name/diff-${method//\//-}"
  done
}

compare_pair() {
  palimpsest diff compare "$out/$1"/diff-{crosscoder-l1,crosscoder-batch_topk,diff-first,tuned-first,base-first} \
    --overwrite --quiet --out "$out/$1/compare"
}

read_with=(--max-length 192 --dialogue 'User:' 'Assistant:' --tokens 60k --patch-tokens 4k --attribution-tokens 2k --resume)
palimpsest train sae --model "$zoo/base" "${recipe[@]}" --out "$out/base" --variant first:$btk twin:$btk,seed=1
# The null pairs come first: the diffs of the others read their counts.
train_pair general none
train_pair random-math none
diff_pair general
diff_pair random-math --no-patch --no-attribute
train_pair math twins
diff_pair math
compare_pair math
for name in planted code math-lora; do
  train_pair $name none
  diff_pair $name
  compare_pair $name
done
compare_pair general
python "$(dirname "$0")/plant_direction.py" "$zoo/base" "$text"/{general,math,code}.train.jsonl \
  --out "$out/models/planted"

model_of() { case $1 in random-math | planted) echo "$out/models/$1" ;; *) echo "$zoo/$1" ;; esac; }

palimpsest train sae --model "$zoo/base" "${recipe[@]}" --out "$out/base" --variant first:$btk twin:$btk,seed=1
for name in math general random-math planted code math-lora; do
  tuned=$(model_of $name)
  pair=(--base "$zoo/base" --tuned "$tuned")
  twins=()
  if [ $name = math ]; then twins=(l1-twin:$l1,seed=1 batch_topk-twin:$btk,seed=1 twin:$btk,seed=1); fi
  palimpsest train crosscoder "${pair[@]}" "${recipe[@]}" --out "$out/$name/crosscoder" --variant l1:$l1 batch_topk:$btk "${twins[@]:0:2}"
  palimpsest train diff-sae "${pair[@]}" "${recipe[@]}" --out "$out/$name/diff" --variant first:$btk "${twins[@]:2}"
  source=(--model "$tuned" "${recipe[@]}")
  if [ $name = math-lora ]; then # an adapter is no model by itself: its activations come from a store of the pair
    palimpsest harvest "$zoo/base" --tuned "$tuned" --site $site --corpus "${train[@]}" --max-length 256 --resume --out "$out/$name/store"
    source=(--store "$out/$name/store" --site $site --latents 2048 --k 32 --tokens 1M --log-every 200 --resume)
  fi
  palimpsest train sae "${source[@]}" --side tuned --out "$out/$name/tuned" --variant first:$btk "${twins[@]:2}"
done

# Nulls first: the diffs of real pairs read them.
read_with=(--max-length 192 --dialogue 'User:' 'Assistant:' --tokens 60k --patch-tokens 4k --attribution-tokens 2k --resume)
for name in general random-math planted math code math-lora; do
  for method in crosscoder/l1 crosscoder/batch_topk diff/first tuned/first base/first; do
    label=${method//\//-}
    folder=$out/$name/$method
    nulls=()
    case $method in base/first) folder=$out/base/first ;; esac
    case $name in general) ;; random-math) nulls=(--no-patch --no-attribute) ;; *) nulls=(--null "$out"/{general,random-math}/diff-$label) ;; esac
    twin=()
    test -d "${folder/first/twin}" && [ "$folder" != "${folder/first/twin}" ] && twin=(--twin "${folder/first/twin}")
    test -d "$folder-twin" && twin=(--twin "$folder-twin")
    palimpsest diff "$zoo/base" "$(model_of $name)" --dictionary "$folder" --corpus "${audit[@]}" "${read_with[@]}" "${nulls[@]}" \
      "${twin[@]}" --quiet --out "$out/$name/diff-$label"
  done
  if [ $name = random-math ]; then continue; fi # a null: its counts are read by the others
  palimpsest diff compare "$out/$name"/diff-{crosscoder-l1,crosscoder-batch_topk,diff-first,tuned-first,base-first} \
    --overwrite --quiet --out "$out/$name/compare"
done
python "$(dirname "$0")/../benchmarks/diff_table.py" "$out"
