"""Options that are the fields of a dataclass."""

import inspect
from dataclasses import dataclass, field

import pytest

from litgpt.cli.groups import option_group


@dataclass
class Size:
    """How large something is.

    Args:
        width: Width in pixels,
            without the border.
        height: Height in pixels.
        depth: Depth in bits.
    """

    width: int = 1
    height: int = 2
    depth: int = 8
    area: int = field(init=False, default=0)


@option_group("size", Size, prefix="box_", defaults={"height": 5}, skip=("depth",))
def draw(name: str, size: Size, color: str = "red") -> tuple[str, Size, str]:
    """Draw a box.

    Args:
        name: Name of the box.
        box_width: Width of the box.
    """
    return name, size, color


def test_fields_are_parameters():
    parameters = inspect.signature(draw).parameters
    assert [(n, p.default) for n, p in parameters.items() if n != "name"] == [
        ("box_width", 1),
        ("box_height", 5),
        ("color", "red"),
    ]
    assert parameters["box_width"].annotation is int
    text = inspect.getdoc(draw) or ""
    assert "box_height: Height in pixels." in text and text.count("box_width:") == 1 and "depth" not in text


def test_flat_keywords_and_the_dataclass():
    assert draw("a") == ("a", Size(1, 5), "red")
    assert draw("a", box_width=3, color="blue") == ("a", Size(3, 5), "blue")
    assert draw("a", size=Size(7, 7, 7)) == ("a", Size(7, 7, 7), "red")
    with pytest.raises(TypeError, match="box_depth"):
        draw("a", box_depth=3)
