"""Draw the figure of fidelity by site from a file of results, as the README shows it.

    scope-lens demo --json results.json
    python tests/scripts/draw_fidelity.py results.json docs/pages/images/fidelity.png

Needs a Chromium; it draws the figure's own HTML.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from scope_lens import figures
from scope_lens.evaluation.each import read_results


def main(results: Path, image: Path, chromium: str) -> None:
    figure = figures.fidelity(list(read_results(results).values()))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.write_html(page, config={"displayModeBar": False})
        size = f"{figure.layout.width + 16},{figure.layout.height + 16}"
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--virtual-time-budget=5000", f"--window-size={size}", f"--screenshot={image.resolve()}", page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    main(**vars(parser.parse_args()))
