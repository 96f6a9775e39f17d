"""Write the pages of evidence from finished folders of `blaq ablate` and `blaq compare`.

    python -m benchmarks.evidence --ablation runs/ablation --compare runs/mnist-steps runs/mnist-gradients \
        --epoch docs/results/epoch.json --out docs/results/evidence

Writes README.md (the answers), ablation.md, methods.md, zigzag.md, cost.md, the numbers behind them (zigzag.csv, points.csv,
cost.csv) and for every folder its results.csv, recipe.toml, comparison.json, tuning.csv, versions.json and command.txt. No
number of the pages is typed by hand.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t

from benchmarks.evidence import ablation, cost, gain, methods, zigzag
from benchmarks.evidence.folders import Folder, read_folder
from benchmarks.evidence.noise import LEVEL
from benchmarks.evidence.words import NOISE, bullets, document, join


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the folders and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", type=Path, help="folder of `blaq ablate` over optim.a and optim.period")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="folders of `blaq compare`")
    parser.add_argument("--epoch", type=Path, help="epoch.json of benchmarks/epoch.py")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.ablation is None and not options.compare:
        parser.error("name at least one folder with --ablation or --compare.")
    options.out.mkdir(parents=True, exist_ok=True)
    compared = [read_folder(path, "compare") for path in options.compare]
    ablated = [] if options.ablation is None else [read_folder(options.ablation, "ablate")]
    pages: dict[str, tuple[str, list[str]]] = {}
    for folder in ablated:
        pages["ablation"] = ablation.page(folder)
    if compared:
        pages["methods"] = methods.page(compared)
        if any(folder.design["budget"] == "steps" and any(folder.zigzag.values()) for folder in compared):
            sections, gains = gain.sections(compared)
            text, falls = zigzag.page(compared, sections)
            pages["zigzag"] = text, [*falls, *gains]
            zigzag.write_measures(compared, options.out)
            gain.write_points(compared, options.out)
        pages["cost"] = cost.page(compared, cost.Times(options.epoch), options.out)
    for folder in [*ablated, *compared]:
        folder.copy_raw(options.out)
    for name, (text, _) in pages.items():
        (options.out / f"{name}.md").write_text(text, encoding="utf-8")
    words = ["python", "-m", "benchmarks.evidence"]
    words += [] if options.ablation is None else ["--ablation", str(options.ablation)]
    words += ["--compare", *map(str, options.compare)] if options.compare else []
    words += ["--epoch", str(options.epoch)] if options.epoch else []
    command = shlex.join([*words, "--out", str(options.out)])
    front = _front({name: answers for name, (_, answers) in pages.items()}, [*ablated, *compared], command)
    (options.out / "README.md").write_text(front, encoding="utf-8")
    print(f"Written to {options.out}: README.md, {', '.join(f'{name}.md' for name in pages)}")


QUESTIONS = {
    "ablation": "Is the effect of a larger than seed noise?",
    "methods": "Who is ahead of LAQ?",
    "zigzag": "Does zig-zagging fall, and does the fall go with a gain?",
    "cost": "What does it cost?",
}


def _front(answers: dict[str, list[str]], folders: Sequence[Folder], command: str) -> str:
    """The page of findings."""
    seeds = sorted({len(folder.design["seeds"]) for folder in folders})
    versions = dict.fromkeys(
        ", ".join(
            f"{name} {of}" for name, of in folder.versions.items() if name not in ("platform", "device", "threads")
        )
        for folder in folders
    )
    sections = [
        "# Evidence: does the step back help, why, and what does it cost?",
        "Written by a script from the raw results beside it, sentences and numbers alike:",
        f"```\n{command}\n```",
        f"Computed with {join(list(versions))}; each folder here has its own command.txt, recipe.toml, "
        "versions.json, and results.csv with a row a run.",
    ]
    for name, question in QUESTIONS.items():
        if name in answers:
            sections += [f"## {question}", f"In full: [{name}.md]({name}.md).", bullets(answers[name])]
    sections += [
        "## How to read it",
        NOISE,
        "Equal steps: every method trains as many epochs, and BLAQ takes two gradients a step. Equal gradient "
        "evaluations: the others train for more epochs, or BLAQ for fewer, their schedules stretched in proportion. "
        "Only what is ahead there is ahead for the same work. `delayed` averages successive gradients without a "
        "trial point: what it gains too, the step back need not explain.",
        "## What these runs cannot tell",
        bullets([
            f"{join([str(count) for count in seeds])} seeds a setting: {_reach(seeds[0])}what is not told apart here "
            "may still differ.",
            "Several tests are made on every page. Those called beyond noise are corrected for their number, each "
            f"measure of each page by itself, at {100 * LEVEL:.0f} %; those called suggested are not, and some of "
            "them are chance.",
            "Seeds change initialisation and the order of examples, not the split of the data.",
            "a and the period of the comparisons are those of their recipe.toml, not tuned for each data set.",
            *(f"{folder.name}: {caveat}" for folder in folders for caveat in folder.caveats()),
        ]),
    ]  # fmt: skip
    return document(sections)


def _reach(seeds: int) -> str:
    """How wide the intervals of so few seeds are."""
    if seeds < 2:
        return "no interval at all; "
    return f"an interval of {seeds} differences is {t.ppf(0.975, seeds - 1):.1f} standard errors to each side; "


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
