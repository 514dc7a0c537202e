"""The demo's last page: recall against chance, losses against chance and floor, captions beside the truth, what to try next."""

import argparse
import json
import math
from pathlib import Path

from contact_sheet import COLUMNS, ROWS, contact_sheet

BATCH, TEXT_VOCABULARY, LABEL_SMOOTHING = 16, 30523, 0.1  # configs/demo/stage1.yaml; BERT's vocabulary and [DEC]
LANGUAGE_VOCABULARY = 49152


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder that holds stage1 and stage2")
    parser.add_argument("--out", type=Path, required=True, help="folder of retrieval.json, captions.jsonl and the contact sheet")
    parser.add_argument("--times", nargs="*", default=[], metavar="PHASE=SECONDS")
    arguments = parser.parse_args()
    rows = captions(arguments.out / "captions.jsonl")
    sheet = arguments.out / "contact_sheet.png"
    contact_sheet(sheet, rows)

    print("\n" + "=" * 100)
    print_recall(json.loads((arguments.out / "retrieval.json").read_text()))
    print_losses(arguments.run)
    print_captions(rows)
    print(f"\nContact sheet: {sheet}")
    print_times(arguments.times)
    print_next(arguments.run)


def captions(path: Path) -> list:
    """(picture, caption, truth) of each generated line; the truth lies beside the picture."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(Path(line["image"]), " ".join(line["text"].split()), Path(line["image"]).with_suffix(".txt").read_text(encoding="utf-8"))
            for line in lines]


def print_recall(retrieval: dict) -> None:
    candidates = retrieval["images"]
    print(f"Retrieval among {candidates} held-out pictures that training never saw (percent)\n")
    print(f"  {'':8}{'picture to name':>18}{'name to picture':>18}{'chance':>10}")
    for row in retrieval["recall"]:
        chance = 100 * row["k"] / candidates
        print(f"  R@{row['k']:<6}{100 * row['image_to_text']:18.1f}{100 * row['text_to_image']:18.1f}{chance:10.1f}")


def print_losses(run: Path) -> None:
    """Each loss as the mean of the last epoch's logged lines, between what guessing costs and the lowest value it can take."""
    print(f"\nTraining losses, mean of the last logged lines\n\n  {'':28}{'reached':>10}{'chance':>10}{'floor':>10}")
    contrast = math.log(BATCH), smoothed_floor(BATCH)
    matching = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3, 0.0  # one matching pair for every two that do not match
    table = [
        ("stage1", "loss_itc", "contrast (ITC)", *contrast), ("stage1", "loss_itm", "matching (ITM)", *matching),
        ("stage1", "loss_itg", "grounded text (ITG)", math.log(TEXT_VOCABULARY), smoothed_floor(TEXT_VOCABULARY)),
        ("stage2", "loss_lm", "language model (stage 2)", math.log(LANGUAGE_VOCABULARY), 0.0),
    ]
    for stage, key, title, chance, floor in table:
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        values = [line[key] for line in lines if key in line][-10:]
        print(f"  {title:28}{sum(values) / len(values):10.3f}{chance:10.3f}{floor:10.3f}")


def smoothed_floor(classes: int) -> float:
    """The entropy of a label smoothed over `classes`: no cross-entropy against it can be lower."""
    other = LABEL_SMOOTHING / classes
    own = 1 - LABEL_SMOOTHING + other
    return -own * math.log(own) - (classes - 1) * other * math.log(other)


def print_captions(rows: list) -> None:
    print(f"\n{'Caption':44}Truth\n")
    for _, caption, truth in rows[: COLUMNS * ROWS]:
        print(f"  {caption[:40]:42}{truth}")
    said = [caption.lower().split() for _, caption, _ in rows]
    true = [truth.lower().split() for _, _, truth in rows]
    shared = sum(len(set(a) & set(b)) / len(set(b)) for a, b in zip(said, true)) / len(rows)
    exact = sum(a == b for a, b in zip(said, true))
    different = len({" ".join(words) for words in said})
    print(f"\n  {different} different captions for {len(rows)} pictures, {exact} word for word, {100 * shared:.0f}% of the true words")


def print_times(times: list) -> None:
    pairs = [entry.rsplit("=", 1) for entry in times]
    parts = ", ".join(f"{name} {clock(int(seconds))}" for name, seconds in pairs)
    print(f"\nTime: {clock(sum(int(seconds) for _, seconds in pairs))} ({parts})")


def clock(seconds: int) -> str:
    return f"{seconds // 60}:{seconds % 60:02d}"


def print_next(run: Path) -> None:
    print(f"""
Next:
  target/release/blip2 generate --model {run}/stage2/export --image YOUR_PICTURE.jpg
  tensorboard --logdir {run}
  target/release/train --config configs/demo/stage1.yaml --set run.name=mine --set 'data.train=[{{shards: "YOUR_SHARDS/*.tar"}}]'
                       (target/release/blip2 shards pack --help turns a folder of pictures and captions into shards)""")


if __name__ == "__main__":
    main()
