"""Write docs/api.md, every public name with what its docstring says: `python tools/api_page.py`."""

import importlib
import inspect
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PACKAGES = {
    "sft_edu": "The library. Importing it loads PyTorch and nothing else.",
    "sft_edu.exercises": "Checks of a learner's answers. None holds an answer, and none raises.",
    "sft_edu.widgets": 'What the lessons show and let one change. Needs the extra: `pip install "sft-edu[lab]"`.',
}
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples):$")


def page() -> str:
    """The whole page."""
    parts = ["# API\n\nEvery public name, from its docstring. `python tools/api_page.py` writes this page.\n"]
    for package, words in PACKAGES.items():
        module = importlib.import_module(package)
        parts.append(f"## {package}\n\n{words}\n")
        parts += [entry(name, getattr(module, name), module) for name in sorted(module.__all__, key=str.lower)]
    return "\n".join(parts)


def entry(name: str, value: object, module: object) -> str:
    """One name: its signature, and its docstring as Markdown."""
    if not callable(value):
        return f"### {name}\n\n{_string_below(name, module)}\n"
    return f"### {name}\n\n    {_signature(name, value)}\n\n{_markdown(inspect.getdoc(value) or '')}\n"


def _signature(name: str, value: object) -> str:
    """On one line if it fits, else a line for each parameter."""
    # Of a class, as its own __init__ says: some Pythons take the __new__ that traitlets has.
    initialised = isinstance(value, type) and inspect.isfunction(value.__init__)
    try:
        signature = inspect.signature(value.__init__.__get__(value) if initialised else value)
    except ValueError:  # a warning takes anything
        return name
    text = str(signature)
    if len(text) > 100:
        text = re.sub(r"^\((.*)\)( -> |$)", lambda found: f"({_lines(signature)}    ){found[2]}", text)
    text = re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)
    return name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are strings


def _lines(signature: inspect.Signature) -> str:
    shown = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(str(parameter))
    return "\n" + "".join(f"        {text},\n" for text in shown)


def _string_below(name: str, module: object) -> str:
    """The string below the definition of a value, wherever the package took it from."""
    for source in vars(module).values():
        if inspect.ismodule(source):
            text = inspect.getsource(source)
            if found := re.search(rf'^{name}\b.*?^"""(.*?)"""', text, re.MULTILINE | re.DOTALL):
                return found[1]
    raise LookupError(f"{name} has no string below its definition")


def _markdown(docstring: str) -> str:
    """Sections become bold words and lists; examples are code already by their indent."""
    lines = []
    section = ""
    for line in docstring.splitlines():
        if found := _SECTION.match(line):
            section = found[1]
            lines += [f"**{section}**", ""]
        elif section in ("", "Returns", "Yields"):
            lines.append(line.strip() if section else line)
        elif section in ("Example", "Examples"):
            lines.append(line)
        elif item := re.match(r"^    (\*{0,2}\w[\w, `*]*): (.*)", line):
            lines.append(f"- `{item[1]}`: {item[2]}")
        else:
            lines.append(f"  {line.strip()}" if line.strip() else "")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
