"""Write the README's table of speeds, and draw them, from the .json files that the benches wrote with --output.

    python tools/bench/table.py tools/bench/results/*.json

The rows stand between the two comments of MARKS, in the order of the files, each with its command; machines are told
below. Nothing else of the README changes. The drawing, PLOT, has a bar for each peer that jaxpost was compared with.
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, PLOT = ROOT / "README.md", ROOT / "docs" / "speeds.png"
MARKS = "<!-- speeds: written by tools/bench/table.py -->", "<!-- end of speeds -->"
PEERS = {"trl": "#d1603d", "transformers": "#c9a227", "tunix": "#2a6f97"}  # and the colors of their bars


def table(results: list[dict]) -> str:
    """In Markdown; rows say by a letter on which machine and day they were measured."""
    places = list(dict.fromkeys((row["machine"], row["date"], told(row["versions"])) for row in results))
    letters = {place: chr(ord("a") + number) for number, place in enumerate(places)}
    lines = ["| what | figure | on | command |", "|---|---|---|---|"]
    for row in results:
        letter = letters[row["machine"], row["date"], told(row["versions"])]
        lines.append(f"| {row['what']} | {row['figure']} | {letter} | `{row['command']}` |")
    notes = [f"{letter}: {machine}, {date}, {names}" for (machine, date, names), letter in letters.items()]
    return "\n".join([*lines, "", ". ".join(notes) + "."])


def told(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def draw(results: list[dict], path: Path) -> None:
    """A bar as long as jaxpost is better than a peer, from the greatest to the least."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = [(ratio, peer, row["what"]) for row in results for peer, ratio in row.get("ratios", {}).items()]
    bars = sorted(bar for bar in bars if bar[1] in PEERS)
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(bars)), dpi=130, layout="constrained")
    ax = figure.subplots()
    ratios, peers, names = zip(*bars, strict=True)
    drawn = ax.barh(range(len(bars)), ratios, color=[PEERS[peer] for peer in peers])
    ax.bar_label(drawn, [f"{ratio:.2f}x {peer}" for ratio, peer, _ in bars], padding=3, fontsize=8)
    ax.set_yticks(range(len(bars)), names, fontsize=8)
    ax.axvline(1, color="#333333", linewidth=0.8)
    ax.margins(x=0.15)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("times as fast as the peer, or as small; the line is the peer")
    ax.legend(handles=[Patch(color=color, label=peer) for peer, color in PEERS.items()], loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    text, (begin, end) = README.read_text(encoding="utf-8"), MARKS
    if begin not in text or end not in text:
        raise SystemExit(f"README.md lacks the comments {begin} and {end}")
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in args.results]
    before, after = text.split(begin)[0], text.split(end)[1]
    README.write_text(f"{before}{begin}\n{table(rows)}\n{end}{after}", encoding="utf-8")
    draw(rows, PLOT)


if __name__ == "__main__":
    main()
