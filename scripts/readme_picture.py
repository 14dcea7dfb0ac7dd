"""Make the README's picture, docs/images/demo.svg, from the run folder of a comparison; the figures are its report's.

Run it: python scripts/readme_picture.py runs/digits
"""

import re
import sys
from pathlib import Path

from twicing.experiments import figures
from twicing.experiments.drawing import arm_styles
from twicing.experiments.findings import primary_rows, read_run

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.svg"
COLUMNS, WIDTH, HEIGHTS, GAP, KEY = 3, 280, (130, 200), 12, 30


def main(folder: Path) -> None:
    """Write the picture of the comparison in the folder."""
    run = read_run(folder)
    styles = arm_styles([arm.label for arm in run.arms], [arm.label for arm in run.arms if arm.control])
    rows = figures.differences(primary_rows(run), styles)
    by_layer = figures.by_layer(run.records, styles)
    strength = figures.accuracy_against_strength(run.records, styles)
    # Block outputs after training: the similarity of tokens, and their rank beside it; then PGD.
    panels = [*rows.panels, by_layer[0].panels[3], by_layer[2].panels[3], strength.panels[0]]
    width, height = COLUMNS * (WIDTH + GAP) + GAP, KEY + sum(HEIGHTS) + 2 * GAP
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" color="#1a1b1c" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    x = GAP
    for label, style in styles.items():
        parts.append(f'<text x="{x}" y="19" font-size="13" fill="{style.color}">{style.sign} {label}</text>')
        x += 9 * len(label) + 40
    for place, panel in enumerate(str(panel.svg()) for panel in panels):
        left = GAP + place % COLUMNS * (WIDTH + GAP)
        line = place // COLUMNS
        top = KEY + sum(HEIGHTS[:line]) + line * GAP
        placed = re.sub(r'\b(width|height)="[^"]*"', "", panel.split(">", 1)[0])
        placed = placed.replace("<svg ", f'<svg x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHTS[line]}" ', 1)
        parts.append(placed + ">" + panel.split(">", 1)[1])
    PICTURE.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name one run folder: python scripts/readme_picture.py runs/digits")
    main(Path(sys.argv[1]))
