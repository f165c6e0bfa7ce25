"""The embedded pictures: three photographs that pinned packages ship, and scenes, charts and words drawn here.

Each drawn picture is made from its number alone, and its caption from what was drawn: so a list of any length begins
with the shorter ones, and no caption can be wrong. Photographs: Grace Hopper (U.S. Navy, public domain; in
matplotlib), a pagoda (Daniel Büchele, CC BY 2.0) and a dahlia (vultilion on Flickr, CC BY 2.0; both in scikit-learn).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.inputs.pictures import Picture, Pictured

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

SIDE = 224
"""Pixels of a drawn picture's shorter side."""

_COLOURS = {
    "red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "orange": "#ff7f0e", "purple": "#9467bd",
    "brown": "#8c564b", "pink": "#e377c2", "yellow": "#f2c60c", "black": "#202020",
}  # fmt: skip
_GROUNDS = {"white": "#ffffff", "grey": "#c8c8c8", "pale blue": "#d8e8f8", "cream": "#fbf3d9"}
_SHAPES = ("circle", "square", "triangle", "ring", "cross")
_PLACES = ("top left", "top right", "bottom left", "bottom right")
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_WORDS = (
    *("OPEN", "EXIT", "BAKERY", "PLATFORM 4", "NO PARKING", "LIBRARY", "SALE", "TICKETS", "WELCOME", "STOP"),
    *("COFFEE", "MARKET", "SCHOOL", "DETOUR", "PHARMACY", "FRESH FRUIT", "MIND THE STEP", "QUIET PLEASE"),
)
_ITEMS = ("apples", "pears", "plums", "bread", "cheese", "tea", "rice", "eggs", "milk", "salt", "soap", "paper")
_PHOTOGRAPHS = (
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg",
     "A portrait of an elderly woman with glasses in a dark naval uniform and cap, in front of a flag."),
    ("sklearn", "datasets/images/china.jpg",
     "A tall Chinese pagoda with four tiers of tiled roofs among trees, above a hazy lake with a bridge."),
    ("sklearn", "datasets/images/flower.jpg",
     "A close view of a pale orange dahlia with many rounded petals, on a blurred dark background."),
)  # fmt: skip


def embedded(count: int) -> tuple[Pictured, ...]:
    """The first pictures of the embedded list.

    Args:
        count: How many.
    """
    return tuple(_item(number) for number in range(count))


def _item(number: int) -> Pictured:
    if number < len(_PHOTOGRAPHS):
        package, file, caption = _PHOTOGRAPHS[number]
        return Pictured.of_caption(
            Picture(f"embedded picture {number + 1}", partial(_photograph, package, file)), caption
        )
    draw = _KINDS[number % len(_KINDS)]
    caption, make = draw(random.Random(number))
    return Pictured.of_caption(Picture(f"embedded picture {number + 1}", make), caption)


def _photograph(package: str, file: str) -> Image.Image:
    from PIL import Image

    try:
        path = resources.files(package).joinpath(file)
    except ModuleNotFoundError as error:
        raise UserError(f"the embedded pictures need {error.name}; install what requirements.lock has") from None
    with path.open("rb") as stream:
        image = Image.open(stream)
        image.load()
    return image


def _canvas(ground: str, wide: bool = False) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE * 3 // 2 if wide else SIDE, SIDE), ground)
    return image, ImageDraw.Draw(image)


def _scene(chance: random.Random) -> tuple[str, Callable[[], Image.Image]]:
    """Shapes in the corners."""
    ground = chance.choice(list(_GROUNDS))
    count = chance.randint(2, 4)
    shapes = list(
        zip(
            chance.sample(list(_COLOURS), count),
            [chance.choice(_SHAPES) for _ in range(count)],
            sorted(chance.sample(range(4), count)),
            strict=True,
        )
    )
    parts = [f"{_article(colour)} {colour} {shape} at the {_PLACES[at]}" for colour, shape, at in shapes]
    caption = f"A drawing on a {ground} ground with {', '.join(parts[:-1])} and {parts[-1]}."

    def make() -> Image.Image:
        image, draw = _canvas(_GROUNDS[ground])
        for colour, shape, at in shapes:
            x, y = (SIDE // 4 + (at % 2) * SIDE // 2, SIDE // 4 + (at // 2) * SIDE // 2)
            _shape(draw, shape, x, y, SIDE // 6, _COLOURS[colour])
        return image

    return caption, make


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, colour: str) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=r // 3)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    else:
        draw.line((x - r, y - r, x + r, y + r), fill=colour, width=r // 3)
        draw.line((x - r, y + r, x + r, y - r), fill=colour, width=r // 3)


def _landscape(chance: random.Random) -> tuple[str, Callable[[], Image.Image]]:
    """A house, trees, and a sun or a moon."""
    night, trees, roof = chance.random() < 0.4, chance.randint(0, 4), chance.choice(("red", "blue", "brown"))
    left, windows = chance.random() < 0.5, chance.randint(1, 3)
    sky = "a night sky with a moon" if night else "a blue sky with a sun"
    side = "left" if left else "right"
    caption = (
        f"A house with a {roof} roof and {_NUMBERS[windows]} window{'s' * (windows > 1)} on a green field, under {sky} "
        f"at the {side}, with {_NUMBERS[trees]} tree{'s' * (trees != 1)} beside it."
    )

    def make() -> Image.Image:
        image, draw = _canvas("#101840" if night else "#9fd0f5", wide=True)
        w, h = image.size
        draw.rectangle((0, h * 2 // 3, w, h), fill="#3f8f3f" if not night else "#204820")
        at = w // 6 if left else w * 5 // 6
        draw.ellipse((at - 22, 18, at + 22, 62), fill="#f4f4e0" if night else "#f2c60c")
        draw.rectangle((w // 2 - 50, h // 2, w // 2 + 50, h * 5 // 6), fill="#e8d8b8")
        draw.polygon([(w // 2 - 62, h // 2), (w // 2, h // 3), (w // 2 + 62, h // 2)], fill=_COLOURS[roof])
        for i in range(windows):
            x = w // 2 - 40 + i * 32
            draw.rectangle((x, h // 2 + 18, x + 18, h // 2 + 40), fill="#f6e27a" if night else "#607890")
        for i in range(trees):
            x = 20 + i * 28 if i < 2 else w - 20 - (i - 2) * 28
            draw.rectangle((x - 4, h * 2 // 3 - 8, x + 4, h * 5 // 6), fill="#6b4423")
            draw.ellipse((x - 16, h // 2 - 10, x + 16, h * 2 // 3), fill="#2c6e2c")
        return image

    return caption, make


def _chart(chance: random.Random) -> tuple[str, Callable[[], Image.Image]]:
    """Bars with their values."""
    count = chance.randint(3, 5)
    names, values = chance.sample(_ITEMS, count), chance.sample(range(5, 95), count)
    colour = chance.choice(list(_COLOURS))
    words = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    caption = f"A bar chart in {colour}: {words}. The highest bar is {names[values.index(max(values))]}."

    def make() -> Image.Image:
        image, draw = _canvas("#ffffff", wide=True)
        w, h = image.size
        draw.line((24, 16, 24, h - 32), fill="#202020", width=2)
        draw.line((24, h - 32, w - 8, h - 32), fill="#202020", width=2)
        step = (w - 40) // count
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            x, top = 34 + i * step, h - 32 - (h - 64) * value // 100
            draw.rectangle((x, top, x + step - 14, h - 33), fill=_COLOURS[colour])
            draw.text((x, top - 16), str(value), fill="#202020", font=_font(13))
            draw.text((x, h - 26), name, fill="#202020", font=_font(13))
        return image

    return caption, make


def _sign(chance: random.Random) -> tuple[str, Callable[[], Image.Image]]:
    """Words on a board."""
    first, second = chance.sample(_WORDS, 2)
    board = chance.choice(list(_COLOURS))
    caption = (
        f'{_article(board).capitalize()} {board} board with white letters. It says "{first}" and below that "{second}".'
    )

    def make() -> Image.Image:
        image, draw = _canvas("#e8e8e8", wide=True)
        w, h = image.size
        draw.rounded_rectangle((16, 36, w - 16, h - 36), radius=14, fill=_COLOURS[board])
        for text, y in ((first, h // 2 - 30), (second, h // 2 + 30)):
            draw.text((w // 2, y), text, fill="white", anchor="mm", font=_font(30))
        return image

    return caption, make


def _table(chance: random.Random) -> tuple[str, Callable[[], Image.Image]]:
    """A price list."""
    names = chance.sample(_ITEMS, 4)
    prices = [f"{chance.randint(1, 19)}.{chance.choice(('00', '20', '50', '80', '95'))}" for _ in names]
    words = ", ".join(f"{name} at {price}" for name, price in zip(names, prices, strict=True))
    caption = f"A printed price list: {words}."

    def make() -> Image.Image:
        image, draw = _canvas("#fffdf4")
        for i, (name, price) in enumerate(zip(names, prices, strict=True)):
            y = 30 + i * 46
            draw.text((20, y), name, fill="#202020", font=_font(22))
            draw.text((SIDE - 20, y), price, fill="#202020", anchor="ra", font=_font(22))
            draw.line((16, y + 34, SIDE - 16, y + 34), fill="#a0a0a0")
        return image

    return caption, make


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


_KINDS = (_scene, _landscape, _chart, _sign, _table)
