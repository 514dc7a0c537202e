"""Emoji pictures and their names as WebDataset tar shards: 1,667 pairs to train on, 185 held out."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from packages import AssetError

HELD_OUT = 185
TRAIN_SHARDS = 8
PAIRS = 1852


def write_shards(pictures: Path, names: Path, out: Path) -> None:
    """The split and the order follow the digest of each key, so they are the same everywhere; the tars' bytes are, too."""
    pairs = sorted(read_pairs(pictures, names), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    if len(pairs) != PAIRS:
        raise AssetError(f"expected {PAIRS} emoji with a picture and a name, got {len(pairs)}")
    write_shard(out / "val" / "00000.tar", pairs[:HELD_OUT])
    train = pairs[HELD_OUT:]
    for shard in range(TRAIN_SHARDS):
        first, end = (len(train) * i // TRAIN_SHARDS for i in (shard, shard + 1))
        write_shard(out / "train" / f"{shard:05d}.tar", train[first:end])


def read_pairs(pictures: Path, names: Path):
    """(key, WebP bytes, name) of every emoji that both packages know. A file's name is its code points in hex, with or without fe0f."""
    with tarfile.open(names) as tarball:
        known = json.load(tarball.extractfile("package/data-by-emoji.json"))
    name_of = {key("-".join(f"{ord(character):04x}" for character in emoji)): entry["name"] for emoji, entry in known.items()}
    with tarfile.open(pictures) as tarball:
        for member in sorted(tarball.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            if path.suffix == ".webp" and key(path.stem) in name_of:
                yield key(path.stem), tarball.extractfile(member).read(), name_of.pop(key(path.stem))


def key(code_points: str) -> str:
    return "-".join(point for point in code_points.split("-") if point != "fe0f")


def write_shard(path: Path, pairs: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for key, picture, name in pairs:
            for extension, data in (("webp", picture), ("txt", name.encode())):
                entry = tarfile.TarInfo(f"{key}.{extension}")  # TarInfo's own defaults: time, owner and group are zero
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
