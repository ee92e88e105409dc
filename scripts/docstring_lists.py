"""Extension of griffe for `make docs`: explained arguments become a list, and comments of fields their docstrings.

Our docstrings explain an argument as ``name: what it is``, several on a line with two spaces between them. Markdown
would join such lines to one paragraph, and read brackets as links.
"""

import re
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Function

NAMES = r"[a-z_*]\w*(?:, [a-z_]\w*)*"
OTHER = re.compile(r"^(Returns?|Raises?|Yields?|Source)\b")


class ArgumentLists(Extension):
    """Rewrites the docstrings of functions and classes, and reads the comments of fields."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        found = re.search(r"  # (.*)$", attr.source)
        if found and attr.docstring is None:
            attr.docstring = Docstring(without_markup(found[1]), parent=attr)

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        rewrite(func.docstring, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        rewrite(cls.docstring, set(cls.members) | {"kwargs"})


def rewrite(docstring: Docstring | None, names: set[str]) -> None:
    if docstring is not None:
        docstring.value = without_markup(with_lists(docstring.value, names))


def without_markup(text: str) -> str:
    """Return the text with a backslash before brackets, asterisks and the like, except in code.

    >>> print(without_markup("B A = [-G]_r, see `a[0]`"))
    B A = \\[-G\\]\\_r, see `a[0]`
    """

    def escaped(plain: str) -> str:
        return re.sub(r"([\[\]*_])", r"\\\1", plain).replace("<", "&lt;")

    parts = re.split(r"(`+[^`]*`+|^    .*$)", text, flags=re.MULTILINE)
    return "".join(part if index % 2 else escaped(part) for index, part in enumerate(parts))


def with_lists(text: str, names: set[str]) -> str:
    """Return the text with a list item for each explained name, and a paragraph for each Returns and Raises.

    >>> print(with_lists("Add.\\n\\na: the first\\nnumber.  b, c: others.\\nReturns their sum.", {"a", "b", "c"}))
    Add.
    <BLANKLINE>
    - `a`: the first
      number.
    - `b, c`: others.
    <BLANKLINE>
    Returns their sum.
    """
    lines: list[str] = []
    listing = False
    for line in text.splitlines():
        for part in re.split(rf"  (?={NAMES}: )", line) if not line.startswith(" ") else [line]:
            found = re.match(rf"({NAMES}): (.*)", part)
            if found and names.intersection(found[1].split(", ")):
                lines += [] if listing or not lines or not lines[-1] else [""]
                lines.append(f"- `{found[1]}`: {found[2]}")
                listing = True
            elif OTHER.match(part):
                lines += ["", part] if lines and lines[-1] else [part]
                listing = False
            elif listing and part:
                lines.append(f"  {part.strip()}")
            else:
                lines.append(part)
                listing = False
    return "\n".join(lines)
