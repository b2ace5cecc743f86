"""The page that a run leaves behind: one file with its curves, its answers and its settings, and nothing to fetch."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib

from sft_edu.commands.run_plots import run_figure
from sft_edu.digits import fixed

_LONGEST = 600  # characters of a text
_COLUMNS = 4  # of answers: the first, the last, and some between
_JOINERS = "\u200c\u200d"  # invisible, but emoji and Persian words are made with them

Line = Mapping[str, object]

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1f24; --faint: #5d646d; --line: #c9ced6; --paper: #fff; --wrong: #9a3412;
  --right: #14652f; --shade: #0004; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e8eb; --faint: #a9b1ba; --line: #4a515a; --paper: #16191d;
  --wrong: #fdb863; --right: #7fd89a; --shade: #fff5; }} }}
body {{ margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin-bottom: .3rem; }}
h2 {{ font-size: 1.1rem; margin-top: 2.2rem; }}
p {{ margin: .3rem 0; }}
img {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; box-sizing: border-box; width: fit-content; max-width: 100%; padding: 0 .8rem;
  border: 1px solid var(--line); border-radius: 4px; scrollbar-width: thin; scrollbar-color: var(--faint) transparent;
  /* A shadow at each end that hides something. */
  background: linear-gradient(to right, var(--paper) 60%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 60%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll; }}
tr:last-child > * {{ border-bottom: 0; }}
tr > :last-child {{ padding-right: 0; }}
table {{ border-collapse: collapse; font-size: .875rem; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: top; }}
th {{ font-weight: 600; }}
td {{ font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 6rem; }}
td small {{ display: block; font-family: system-ui, sans-serif; }}
.right {{ color: var(--right); }} .wrong {{ color: var(--wrong); }} .note {{ color: var(--faint); }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def report_page(title: str, summary: Sequence[str], lines: Sequence[Line], settings: Mapping[str, object]) -> str:
    """A page of HTML about a run. Whatever texts hold, they are shown as text.

    Args:
        title: of the page.
        summary: sentences that come first.
        lines: of `metrics.jsonl`.
        settings: names and values, as they were asked for.
    """
    body = [f"<h1>{as_text(title)}</h1>", *(f"<p>{as_text(sentence)}</p>" for sentence in summary)]
    if lines:
        body += ["<h2>Curves</h2>", _curves(lines)]
    evaluated = [line for line in lines if line.get("answers")]
    if evaluated:
        body += ["<h2>Answers to held-out examples</h2>", _answers(_spread(evaluated))]
    body += ["<h2>Settings</h2>", _settings(settings)]
    return _PAGE.format(title=as_text(title), body="\n".join(body))


def as_text(value: object) -> str:
    """A value as HTML text. What is invisible, or would turn the text around it, is shown by its number."""
    text = str(value)
    text = text[:_LONGEST] + "…" * (len(text) > _LONGEST)
    shown = (c if c.isprintable() or c in "\n" or c in _JOINERS else f"\\u{ord(c):04x}" for c in text)
    return html.escape("".join(shown))


def in_words(lines: Sequence[Line]) -> str:
    """What the curves show, for those who do not see them."""
    first, last = lines[0], lines[-1]
    words = (
        f"Over optimizer steps {first['step']} to {last['step']} the negative log-likelihood per response token goes "
        f"from {_number(first['nll'])} to {_number(last['nll'])} nats in training"
    )
    scored = [line for line in lines if "held_out_exact_match" in line]
    if scored:
        shares = [f"{line['held_out_exact_match']:.1%}" for line in (scored[0], scored[-1])]
        words += f"; right answers to held-out examples from {shares[0]} to {shares[1]}"
    clipped = sum(line["clipped_norm"] < line["grad_norm"] for line in lines)
    return f"{words}. The gradient was clipped in {clipped:,} of {len(lines):,} steps."


def _curves(lines: Sequence[Line]) -> str:
    narrow, dark = "(max-width: 700px)", "(prefers-color-scheme: dark)"
    sources = (
        f'<source media="{media}" srcset="{_svg(lines, **look)}">'
        for media, look in (
            (f"{narrow} and {dark}", {"dark": True, "columns": 1}),
            (narrow, {"dark": False, "columns": 1}),
            (dark, {"dark": True, "columns": 2}),
        )
    )
    words = as_text(in_words(lines))
    return (
        f'<picture>{"".join(sources)}<img src="{_svg(lines, dark=False, columns=2)}" alt="{words}">'
        f'</picture>\n<p class="note">{words}</p>'
    )


def _svg(lines: Sequence[Line], *, dark: bool, columns: int) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sft_edu"}):  # equal runs, equal pages
        run_figure(lines, dark=dark, columns=columns).savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _spread(evaluated: Sequence[Line]) -> list[Line]:
    """A few of the evaluations, evenly, the first and the last among them."""
    last = len(evaluated) - 1
    places = {round(last * column / (_COLUMNS - 1)) for column in range(_COLUMNS)}
    return [evaluated[place] for place in sorted(places)]


def _answers(evaluated: Sequence[Line]) -> str:
    heads = ["prompt", "expected", *(f"after step {line['step']:,}" for line in evaluated)]
    rows = []
    for answers in zip(*(line["answers"] for line in evaluated), strict=False):
        cells = [f"<td>{as_text(answers[0][name])}</td>" for name in ("prompt", "expected")]
        for answer in answers:
            verdict = "right" if answer["is_right"] else "wrong"
            cells.append(f'<td>{as_text(answer["answer"])}<small class="{verdict}">{verdict}</small></td>')
        rows.append("<tr>" + "".join(cells) + "</tr>")
    head = "".join(f'<th scope="col">{as_text(name)}</th>' for name in heads)
    return f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _settings(settings: Mapping[str, object]) -> str:
    rows = (
        f'<tr><th scope="row">{as_text(name)}</th><td>{as_text("—" if value is None else value)}</td></tr>'
        for name, value in settings.items()
    )
    return '<div class="scroll" tabindex="0"><table>\n' + "\n".join(rows) + "\n</table></div>"


def _number(value: float | None) -> str:
    return "no number" if value is None else fixed(value)
