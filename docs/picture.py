"""Draw the picture of the README: a moment of a replay, in a headless Chromium.

    python docs/picture.py

It answers a prompt with the small checkpoint, and writes `docs/replay.png`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "replay.png"
PROMPT = "Mia the fox lived by the river."
MOMENT = 9  # the second block, half resolved
SIZE = (860, 540)


def main() -> None:
    """Write the picture."""
    sys.path.insert(0, str(ROOT))
    from tests.support import TWOTOWER
    from tests.support.browser import address_of, chromium

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, page = Path(folder, "checkpoint"), Path(folder, "replay.html")
        subprocess.run([*TWOTOWER, "tiny", str(checkpoint), "--pretrained"], check=True)
        run = ["run", str(checkpoint), "--prompt", PROMPT, "--html", str(page)]
        subprocess.run([*TWOTOWER, *run, "--max-new-tokens", "64"], check=True)
        with chromium() as browser:
            browser.resize(*SIZE)
            browser.open(address_of(page))
            browser.run(f"board.go({MOMENT}); document.body.style.overflow = 'hidden'")
            PICTURE.write_bytes(browser.screenshot())
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
