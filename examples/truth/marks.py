"""Parts of pages that scripts write anew, between marks; what people wrote around them stays."""


def between_marks(whole: str, text: str, name: str) -> str:
    """The page with ``text`` between the marks of ``name``, or at its end if there are none."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, _, rest = whole.partition(first)
    tail = rest.partition(last)[2] or "\n"
    return f"{head}{first}\n{text}\n{last}{tail}"
