"""Code of the process that runs a program: it loads the program and answers calls; it also encodes the values.

Nothing in this process is trusted or secret: the tests are in another process, the judge. A program that takes control
of this code can only answer calls, with plain data.

Values are sent as Python literals of exact None, bool, int, str and (kind, content) pairs, so the judge rebuilds them
without running code of the program. The file imports nothing of the project: its text is passed to
``python -I -S -c``.
"""

import os

CHANNEL = 3  # the file descriptor of the socket to the judge
UP = b"up\n"


def packed(value):
    """Encode a value as a literal; an iterator is exhausted; other objects become ("object", (type, truth))."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 62 else ("int", hex(value))
    if isinstance(value, str):
        return "".join(value)
    if isinstance(value, float):
        return ("float", float.hex(value))
    if isinstance(value, complex):
        return ("complex", (float.hex(value.real), float.hex(value.imag)))
    if isinstance(value, (bytes, bytearray)):
        return ("bytearray" if isinstance(value, bytearray) else "bytes", value.hex())
    if isinstance(value, range):
        return ("range", (value.start, value.stop, value.step))
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return (kind.__name__, [packed(item) for item in value])
    if isinstance(value, dict):
        return ("dict", [(packed(key), packed(item)) for key, item in value.items()])
    name = type(value).__name__
    if name in ("Fraction", "Decimal"):
        return (name, str(value))
    if hasattr(value, "__next__"):
        return ("iterator", [packed(item) for item in value])
    return ("object", (name, bool(value)))


class Object:
    """Placeholder for a value that is not plain data; it is equal only to itself."""

    def __init__(self, name, truth):
        self.name, self.truth = name, truth

    def __repr__(self):
        return f"<{self.name}>"

    def __bool__(self):
        return self.truth is True


def unpacked(data):
    """Decode a value, with exact built-in types. Raises KeyError, TypeError, ValueError: not an encoded value."""
    if not isinstance(data, tuple):
        return data
    kind, content = data
    return REBUILD[kind](content)


def _number(module, kind):
    return lambda text: getattr(__import__(module), kind)(text)


REBUILD = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*parts),
    "list": lambda items: [unpacked(item) for item in items],
    "tuple": lambda items: tuple(unpacked(item) for item in items),
    "set": lambda items: {unpacked(item) for item in items},
    "frozenset": lambda items: frozenset(unpacked(item) for item in items),
    "dict": lambda pairs: {unpacked(key): unpacked(item) for key, item in pairs},
    "Fraction": _number("fractions", "Fraction"),
    "Decimal": _number("decimal", "Decimal"),
    "iterator": lambda items: iter([unpacked(item) for item in items]),
    "object": lambda parts: Object(*parts),
}


def described(error):
    """Return ``TypeError: message`` in one line; str() of a hostile exception may raise another exception."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def main():
    """Send UP, load the program, then answer calls; each answer is ("value", result) or ("raised", reason)."""
    os.environ.clear()
    requests, replies = os.fdopen(CHANNEL, "rb"), os.fdopen(os.dup(CHANNEL), "wb")

    def reply(make):
        try:
            answer = ("value", packed(make()))
        except BaseException as error:
            answer = ("raised", described(error))
        replies.write(ascii(answer).encode() + b"\n")
        replies.flush()

    replies.write(UP)
    replies.flush()
    program, name = eval(requests.readline())
    namespace = {}

    def load():
        exec(compile(program, "program.py", "exec"), namespace)
        if name not in namespace:
            raise NameError(f"name {name!r} is not defined")

    reply(load)
    for line in requests:
        arguments, named = eval(line)
        reply(lambda: namespace[name](*unpacked(arguments), **unpacked(named)))  # noqa: B023 (called at once)


if __name__ == "__main__":
    main()
