"""Write the README's table of speeds from the .json files that the benches wrote with --output.

    python tools/bench/table.py tools/bench/results/*.json

The rows stand between the two comments of MARKS, in the order of the files, each with its command; machines are told
below. Nothing else of the README changes.
"""

import argparse
import json
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MARKS = "<!-- speeds: written by tools/bench/table.py -->", "<!-- end of speeds -->"


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


if __name__ == "__main__":
    main()
