"""Unpacks the pictures of a shard, numbered in the shard's order, with their names beside them."""

import argparse
import tarfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(arguments.shard) as shard:
        for i, member in enumerate(shard):
            key, extension = member.name.split(".", 1)
            (arguments.out / f"{i // 2:04d}_{key}.{extension}").write_bytes(shard.extractfile(member).read())


if __name__ == "__main__":
    main()
