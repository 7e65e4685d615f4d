"""Evaluate the embedded dictionaries on the whole hold-out text and draw the figure that the README shows.

    python tests/scripts/draw_fidelity.py results.json docs/pages/images/fidelity.png

About ten minutes on one core; a second run takes the results that are there. Needs a Chromium, which draws the figure's
own HTML.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from scope_lens import demo, figures
from scope_lens.evaluation.each import evaluate_each


def main(results: Path, image: Path, chromium: str) -> None:
    torch.set_num_threads(1)
    saes = {sae.cfg.path: sae for sae in demo.load_saes()}
    named = list(evaluate_each(demo.load_model(), demo.text(), saes=saes, path=results))
    figure = figures.fidelity([result for _, result in named])
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
