#!/usr/bin/env bash
# The environment of the peers that cannot share ours: eai-sparsify and dictionary-learning, from their own packages.
#
#   benchmarks/peers.sh [FOLDER]      (default: .venv-peers beside the checkout's .venv; git ignores it)
#
# torch goes first and pinned. dictionary-learning asks for nnsight < 0.4, which asks for torchvision, whose newest
# release would bring another torch; the torchvision named here accepts ours, but cannot be imported beside a CPU torch
# and would break transformers, so it goes again. `Trainer.update` and the dictionaries work without it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-peers}
torch=$(grep '^torch==' constraints.txt)
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "$torch"
"${pip[@]}" install "$torch" torchvision==0.28.0 dictionary-learning==0.1.0 eai-sparsify==1.3.3
"${pip[@]}" uninstall --yes torchvision
"$folder/bin/python" -W ignore -c "import sparsify, dictionary_learning.trainers.top_k" >/dev/null
