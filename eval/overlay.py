"""Pictures that show which tokens were kept: dropped patches dimmed, kept ones as they are and outlined."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

OUTLINE = (255, 140, 0)
ANSWER_BOX = (0, 200, 255)
RIGHT, WRONG, INK, PAPER = (20, 120, 60), (190, 40, 40), (30, 30, 30), (255, 255, 255)
PANEL = 420  # pixels along the longer side of a panel of `comparison`
MARGIN = 16
LINE = 24

Box = tuple[int, int, int, int]


def overlay(
    picture: Image.Image,
    rows: int,
    cols: int,
    kept: Collection[int],
    side: int = 288,
    boxes: Sequence[Box] = (),
) -> Image.Image:
    """A picture with the kept tokens drawn on it.

    Args:
        picture: what the model saw.
        rows, cols: its token grid.
        kept: indices of kept tokens in that grid, in raster order.
        side: longer side of the result in pixels.
        boxes: pixel boxes (x0, y0, x1, y1) in `picture` to mark, such as the place of the answer.

    Returns:
        RGB picture, as close to the proportions of `picture` as whole pixels allow.
    """
    scale = side / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    bright = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    grey = bright.convert("L").convert("RGB")
    canvas = Image.blend(grey, Image.new("RGB", grey.size, (40, 40, 48)), 0.72)
    stays = set(kept)
    draw = ImageDraw.Draw(canvas)

    def cell(row: int, col: int) -> Box:
        return (
            col * width // cols,
            row * height // rows,
            (col + 1) * width // cols,
            (row + 1) * height // rows,
        )

    for index in stays:
        box = cell(*divmod(index, cols))
        canvas.paste(bright.crop(box), box[:2])
    thick = max(1, side // 200)
    if len(stays) < rows * cols:
        for index in stays:
            row, col = divmod(index, cols)
            x0, y0, x1, y1 = cell(row, col)
            edges = (
                (row == 0 or index - cols not in stays, (x0, y0, x1, y0)),
                (row == rows - 1 or index + cols not in stays, (x0, y1 - 1, x1, y1 - 1)),
                (col == 0 or index - 1 not in stays, (x0, y0, x0, y1)),
                (col == cols - 1 or index + 1 not in stays, (x1 - 1, y0, x1 - 1, y1)),
            )
            for is_border, line in edges:
                if is_border:
                    draw.line(line, fill=OUTLINE, width=thick)
    for box in boxes:
        draw.rectangle([round(v * scale) for v in box], outline=ANSWER_BOX, width=thick)
    return canvas


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    from matplotlib import font_manager

    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(properties), size)


def comparison(
    picture: Image.Image,
    rows: int,
    cols: int,
    kept: Collection[int],
    question: str,
    dense_answer: str,
    pruned_answer: str,
    title: str,
) -> Image.Image:
    """The picture beside its overlay, with the question and both answers below.

    Args:
        picture: what the model saw.
        rows, cols: its token grid.
        kept: indices of kept tokens.
        question: what was asked.
        dense_answer, pruned_answer: answers without and with pruning.
        title: method and budget.

    Returns:
        RGB picture as large as :func:`comparison_size` says.
    """
    left = overlay(picture, rows, cols, range(rows * cols), PANEL)
    right = overlay(picture, rows, cols, kept, PANEL)
    question_lines = _wrap(f"Q: {question}", comparison_size(picture, question)[0] - 2 * MARGIN)
    canvas = Image.new("RGB", comparison_size(picture, question), PAPER)
    draw = ImageDraw.Draw(canvas)
    answer_colour = INK if dense_answer == pruned_answer else WRONG
    columns = (
        (left, f"dense: all {rows * cols} tokens", dense_answer, INK),
        (right, f"{title}: {len(kept)} of {rows * cols} tokens", pruned_answer, answer_colour),
    )
    for number, line in enumerate(question_lines):
        draw.text((MARGIN, MARGIN + number * LINE), line, fill=INK, font=font(17, True))
    top = MARGIN + len(question_lines) * LINE + MARGIN // 2
    for number, (panel, heading, answer, colour) in enumerate(columns):
        x = MARGIN + number * (PANEL + MARGIN)
        draw.text((x, top), _shorten(heading, PANEL, 15), fill=INK, font=font(15))
        canvas.paste(panel, (x, top + LINE))
        draw.text(
            (x, top + LINE + panel.height + MARGIN // 2),
            _shorten(f"A: {answer or '(no answer)'}", PANEL, 17, True),
            fill=colour,
            font=font(17, True),
        )
    return canvas


def comparison_size(picture: Image.Image, question: str) -> tuple[int, int]:
    """Width and height of what :func:`comparison` draws."""
    width = 2 * PANEL + 3 * MARGIN
    lines = len(_wrap(f"Q: {question}", width - 2 * MARGIN))
    panel = max(1, round(picture.height * PANEL / max(picture.size)))
    return width, MARGIN + lines * LINE + MARGIN // 2 + LINE + panel + MARGIN // 2 + LINE + MARGIN


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(17, True).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _shorten(text: str, width: int, size: int, bold: bool = False) -> str:
    if font(size, bold).getlength(text) <= width:
        return text
    while text and font(size, bold).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
