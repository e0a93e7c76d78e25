"""Write a JSONL corpus whose rows hold the same words in a random order: training data that teaches no meaning."""

import json
import random
import sys
from pathlib import Path

source, target = map(Path, sys.argv[1:3])
order = random.Random(0)
with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as out:
    for line in rows:
        words = json.loads(line)["text"].split(" ")
        order.shuffle(words)
        out.write(json.dumps({"text": " ".join(words)}, ensure_ascii=False) + "\n")
