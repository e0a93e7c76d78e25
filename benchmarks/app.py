"""What the app and the report cost on a large examples run: `python benchmarks/app.py --latents 65536 --examples 100`.

Writes a synthetic examples folder of that size, then measures
- the app: 95th percentile of search pages and latent pages over HTTP, and the memory of the server's process;
- the report: seconds to build it, its size, and how long Chromium takes to paint it first (skipped without Chromium).

Prints a table, and with --json OUT writes the figures there.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

SEARCHES = ("river", "return", "word17", "word399", "apples", "zzz", "4711", "2", "(", "word1")
SORTS = ("rate_change", "rate", "rate_tuned", "max_value", "decoder_cosine", "latent")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def resident_mb(process: int) -> float:
    """Memory of a process without what it maps from files, in MB."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
    )
    return int(fields["VmRSS"].split()[0]) / 1024


def cpu_ms(process: int) -> float:
    """Processor time of a process so far: what a page costs, whatever else the machine does."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Client:
    """One kept connection to the app, as a browser holds one."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.host = parts.netloc
        self.connection = http.client.HTTPConnection(self.host, timeout=60)
        answer = self._get(f"/?{parts.query}", {})
        self.cookie = {"Cookie": answer.getheader("set-cookie").split(";")[0]}

    def _get(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        self.connection.request("GET", path, headers={"Host": self.host, **headers})
        answer = self.connection.getresponse()
        answer.body = answer.read()
        return answer

    def get(self, path: str, fragment: bool = False) -> tuple[float, bytes]:
        """Milliseconds until the whole page is there, and the page."""
        headers = self.cookie | ({"X-Fragment": "1"} if fragment else {})
        start = time.perf_counter()
        answer = self._get(path, headers)
        assert answer.status == 200, (path, answer.status, answer.body[:300])
        return 1e3 * (time.perf_counter() - start), answer.body


def measure_app(folder: Path, latents: int, rounds: int) -> dict[str, Any]:
    """Search and latent pages of the app over HTTP."""
    command = [sys.executable, "-m", "palimpsest", "serve", str(folder), "--port", "0", "--json"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        client = Client(json.loads(server.stdout.readline())["address"])
        rng = random.Random(0)
        _, page = client.get("/?q=examples")
        run = page.split(b'href="/run/')[1][:12].decode()
        start = resident_mb(server.pid)
        first, _ = client.get(f"/run/{run}/latents")
        times: dict[str, list[float]] = defaultdict(list)
        spent: dict[str, float] = {}
        pages = {
            # A text that was not asked for before, as while one types.
            "search": lambda: (f"latents?q={quote(rng.choice(SEARCHES))}{rng.randrange(10**6)}", True),
            "again": lambda: (f"latents?q={quote(rng.choice(SEARCHES))}&sort={rng.choice(SORTS)}", True),
            "browse": lambda: (f"latents?sort={rng.choice(SORTS)}&page={rng.randrange(1, 500)}", False),
            "filter": lambda: (f"latents?lo.rate_tuned={rng.uniform(0, 3):.2f}&hi.rate_base=2", True),
            "latent": lambda: (f"latent/{rng.randrange(latents) // 10 * 10}?q=river&at=3", False),
        }
        for name, page in pages.items():
            before = cpu_ms(server.pid)
            for _ in range(rounds):
                path, fragment = page()
                times[name].append(client.get(f"/run/{run}/{path}", fragment)[0])
            spent[name] = (cpu_ms(server.pid) - before) / rounds
        found = {
            f"{name}_{label}_ms": round(percentile(values, share), 1)
            for name, values in times.items()
            for label, share in (("p50", 0.5), ("p95", 0.95))
        }
        found |= {f"{name}_cpu_ms": round(value, 1) for name, value in spent.items()}
        return found | {
            "first_page_ms": round(first),
            "memory_at_start_mb": round(start),
            "memory_mb": round(resident_mb(server.pid)),
        }
    finally:
        server.terminate()
        server.wait(timeout=20)


def measure_report(run: Path, folder: Path) -> dict[str, Any]:
    """Building the report of the run, and its first paint."""
    script = (
        "import sys, time, json, resource; t = time.perf_counter()\n"
        "from palimpsest.report import build_report\n"
        "path = build_report(sys.argv[1], sys.argv[2])\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "print(json.dumps([time.perf_counter() - t, str(path), peak]))"
    )
    out = folder / "report"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(run), str(out / "report.html")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seconds, path, peak = json.loads(done.stdout.splitlines()[-1])
    figures = {
        "build_s": round(seconds, 1),
        "peak_mb": round(peak),
        "size_mb": round(Path(path).stat().st_size / 1e6, 2),
    }
    chromium = shutil.which("chromium")
    if chromium is None:
        return figures | {"first_paint_ms": None}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        paints = []
        for _ in range(5):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(Path(path).resolve().as_uri(), wait_until="load")
            page.wait_for_timeout(400)
            paints.append(
                page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            )
            page.close()
        browser.close()
    return figures | {"first_paint_ms": round(sorted(paints)[len(paints) // 2])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--examples", type=int, default=100, help="of each latent")
    parser.add_argument("--rounds", type=int, default=100, help="pages of each kind")
    parser.add_argument(
        "--folder", type=Path, help="keep the synthetic run here, or use the one that is there"
    )
    parser.add_argument("--only", choices=("app", "report"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        run = folder / "examples"
        if not run.exists():
            from latents_fixture import make_examples

            start = time.perf_counter()
            make_examples(run, chosen.latents, chosen.examples)
            size = sum(one.stat().st_size for one in run.iterdir()) / 1e6
            print(
                f"wrote {chosen.latents:,} latents × {chosen.examples} examples, {size:,.0f} MB, "
                f"in {time.perf_counter() - start:.0f} s"
            )
        figures: dict[str, Any] = {"latents": chosen.latents, "examples": chosen.examples}
        if chosen.only != "report":
            figures["app"] = measure_app(folder, chosen.latents, chosen.rounds)
        if chosen.only != "app":
            figures["report"] = measure_report(run, Path(scratch))
    for part in ("app", "report"):
        for name, value in figures.get(part, {}).items():
            print(f"{part:<8}{name:<24}{value}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
