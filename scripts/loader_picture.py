"""Where a loader's time goes, as an SVG: milliseconds of one thread for one picture, part by part, ours beside webdataset with torchvision.

Called by scripts/loader-bench --picture. The peer's parts are measured here, in its own Python: the same bytes, the same functions, one thread.
"""

import io
import json
import sys
import tarfile
import time

COLOURS = {"read": "#8da0cb", "decode": "#66c2a5", "crop and resize": "#fc8d62", "to fp32, normalise": "#e78ac3",
           "caption": "#a6d854", "the rest": "#b3b3b3"}
LEFT, WIDTH, BAR, GAP = 190, 620, 34, 22


def peer_parts(shard: str) -> dict:
    """Seconds a picture of PIL's decoder and torchvision's transforms over one shard."""
    import torch
    from PIL import Image
    from torchvision import transforms as T

    torch.set_num_threads(1)
    crop = T.Compose([T.RandomResizedCrop(224, scale=(0.5, 1.0), interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip()])
    normalise = T.Compose([T.ToTensor(), T.Normalize((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))])
    seconds, pictures = dict.fromkeys(("read", "decode", "crop and resize", "to fp32, normalise"), 0.0), 0
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[part] += now - clock
        clock = now

    with tarfile.open(shard) as archive:
        for member in archive:
            data = archive.extractfile(member).read()
            lap("read")
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(data)).convert("RGB")
                lap("decode")
                image = crop(image)
                lap("crop and resize")
                normalise(image)
                lap("to fp32, normalise")
                pictures += 1
    return {part: spent / pictures for part, spent in seconds.items()}


def our_parts(report: dict) -> dict:
    """The same of `blip2 bench loader --threads 1 --json`."""
    timings = report["timings"]
    parts = {"read": "read_s", "decode": "decode_s", "crop and resize": "resize_s", "caption": "text_s"}
    return {part: timings[key] / timings["samples"] for part, key in parts.items()}


def with_rest(parts: dict, images_per_s: float) -> dict:
    """What the whole loader takes beyond its parts: batches, queues, processes."""
    return {**parts, "the rest": max(1 / images_per_s - sum(parts.values()), 0.0)}


def draw(bars: dict) -> str:
    """`bars`: a loader's name to the seconds of its parts."""
    longest = max(sum(parts.values()) for parts in bars.values())
    scale = WIDTH / longest
    height = 60 + len(bars) * (BAR + GAP) + 30
    text = 'font-family="sans-serif" font-size="13" fill="#222"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 90}" height="{height}">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="12" y="24" {text}>Milliseconds of one thread for one 640x480 JPEG, BLIP-2\'s training transform</text>']
    for row, (name, parts) in enumerate(bars.items()):
        y, x = 44 + row * (BAR + GAP), float(LEFT)
        out.append(f'<text x="12" y="{y + 22}" {text}>{name}</text>')
        for part, seconds in parts.items():
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{seconds * scale:.1f}" height="{BAR}" fill="{COLOURS[part]}"/>')
            if seconds * scale > 34:
                out.append(f'<text x="{x + seconds * scale / 2:.1f}" y="{y + 22}" text-anchor="middle" {text}>{seconds * 1e3:.2f}</text>')
            x += seconds * scale
        out.append(f'<text x="{x + 8:.1f}" y="{y + 22}" {text}>{sum(parts.values()) * 1e3:.2f}</text>')
    x, y = 12, height - 18
    for part, colour in COLOURS.items():
        out.append(f'<rect x="{x}" y="{y - 11}" width="13" height="13" fill="{colour}"/><text x="{x + 18}" y="{y}" {text}>{part}</text>')
        x += 40 + 7 * len(part)
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    print(json.dumps(peer_parts(sys.argv[1])))
