"""One PNG of held-out pictures with the model's caption and the true name under each."""

import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 4, 3
PICTURE, MARGIN, LINE = 224, 24, 26
CELL_WIDTH, CELL_HEIGHT = PICTURE + 2 * MARGIN, PICTURE + 2 * MARGIN + 4 * LINE


def contact_sheet(path: Path, rows: list) -> None:
    """`rows` of (picture file, caption, truth); the first twelve are drawn."""
    sheet = Image.new("RGB", (COLUMNS * CELL_WIDTH, ROWS * CELL_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    caption_font, truth_font = ImageFont.load_default(20), ImageFont.load_default(16)
    for i, (file, caption, truth) in enumerate(rows[: COLUMNS * ROWS]):
        left, top = i % COLUMNS * CELL_WIDTH + MARGIN, i // COLUMNS * CELL_HEIGHT + MARGIN
        with Image.open(file) as picture:
            picture = picture.convert("RGBA").resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top), picture)
        y = top + PICTURE + LINE // 2
        for line in wrapped(draw, caption or "(nothing)", caption_font)[:2]:
            draw.text((left, y), line, fill="black", font=caption_font)
            y += LINE
        draw.text((left, y), wrapped(draw, truth, truth_font)[0], fill="#808080", font=truth_font)
    sheet.save(path)


def wrapped(draw: ImageDraw.ImageDraw, text: str, font) -> list:
    """The text's lines at the picture's width. Pillow's own font has no accents, so they are left off."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    lines = [""]
    for word in plain.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= PICTURE or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
