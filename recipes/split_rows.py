"""Split a JSONL file in two by a checksum of each row's prompt: `split_rows.py ROWS TRAIN HELDOUT [ONE_IN]`.

Rows with the same prompt stay together, so that no held-out prompt was trained on.
"""

import json
import sys
import zlib
from pathlib import Path

source, *targets = map(Path, sys.argv[1:4])
one_in = int(sys.argv[4]) if len(sys.argv) > 4 else 3
with source.open(encoding="utf-8") as rows:
    parts: tuple[list[str], list[str]] = ([], [])
    for line in rows:
        prompt = json.dumps(json.loads(line)["prompt"], sort_keys=True)
        parts[zlib.crc32(prompt.encode()) % one_in == 0].append(line)
for target, lines in zip(targets, parts, strict=True):
    target.write_text("".join(lines), encoding="utf-8")
