"""Docstrings and comments as HTML: prose, commands, lists, tables, and typeset equations.

The scripts write equations as Unicode text, `loss = −log σ(h)`. Here this text becomes TeX, which
KaTeX typesets in the browser. Text that cannot be translated is shown unchanged.
"""
import re
from html import escape
from itertools import groupby

# ---- equations: from Unicode text to TeX ---------------------------------------------------------

NAMES = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "θ": "theta",
         "λ": "lambda", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "Σ": "sum", "Π": "prod",
         "½": "tfrac12", "⅓": "tfrac13", "⅛": "tfrac18", "∇": "nabla", "×": "times", "→": "to",
         "±": "pm", "≈": "approx", "∞": "infty", "log": "log", "exp": "exp", "min": "min",
         "max": "max", "·": "cdot", "argmin": "operatorname{argmin}", "≤": "le", "≥": "ge",
         "argmax": "operatorname{argmax}", "…": "dots", "...": "dots", "∝": "propto", "≻": "succ",
         "~": "sim", "{": "{", "}": "}", "|": "mid"}
TEX = {text: rf"\{name} " for text, name in NAMES.items()} | {mark: mark for mark in "=+<',()[]"}
TEX |= {"−": "-", "²": "^2", "E": r"\mathbb{E}\,", "‖": r"\,\Vert\,"}
BRACKET = r"\((?:[^()]|\([^()]*\))*\)"  # may contain brackets, but one level only
OPERAND = rf"(?:{BRACKET}|\|\w+\||\w+'?(?:{BRACKET})?)"
TOKEN = re.compile(
    rf"(?P<over>{OPERAND}) ?/ ?(?P<under>{OPERAND})"
    rf"|[_^](?P<index>{{[^{{}}]*}}|{BRACKET}|\d+\.\d+|<?\w+?(?![^\W_]))"
    r"|\s+|[A-Za-z]+(?:\d+|'[a-z]+)?|\d+(?:\.\d+)?(?:e-\d+)?|\.\.\.|.")


def runs(text, inside=False):
    """An equation as [text, [TeX, ...]] pairs, where words between equations have no TeX.

    Words inside brackets are set upright. Raises ValueError for an unknown symbol or open bracket.
    """
    found, opened = [["", []]], []
    for match in TOKEN.finditer(text):
        token, following = match.group(), text[match.end():][:1]
        word = token == "a" or re.fullmatch(r"[A-Za-z']{2,}", token) and token not in TEX
        word = word and following not in ("(", "[", "_")  # otherwise it is a function or a variable
        if not (inside or opened) and (word or token in ",:;."):
            tex = []
        elif match["over"]:
            tex = [rf"\frac{{{bare(match['over'])}}}{{{bare(match['under'])}}}"]
        elif match["index"]:
            index = match["index"]
            index = rf"\text{{{index}}}" if re.fullmatch("[A-Za-z]{2,}", index) else bare(index)
            tex = [f"{token[0]}{{{index}}}"]
        elif token.isspace():
            tex = [" "] if found[-1][1] else []
        elif word:
            tex = [rf"\text{{{token}}}"]
        elif re.fullmatch(r"1e-\d+", token):
            tex = [f"10^{{{token[2:]}}}"]
        elif token in TEX or re.fullmatch(r"[A-Za-z]|\d[\d.]*", token):
            tex = [TEX.get(token, token)]
        elif re.fullmatch(r"[A-Za-z]+\d*", token):
            tex = [rf"\operatorname{{{token}}}"]
        else:
            raise ValueError(f"{token!r} in the equation {text!r}")
        if bool(tex) != bool(found[-1][1]):
            found.append(["", []])
        found[-1][0] += token
        found[-1][1] += tex
        if token in ("(", "[", "{"):
            opened.append((token, found[-1][1], len(found[-1][1]) - 1))
        elif token in (")", "]", "}"):
            bracket, parts, start = opened.pop() if opened else ("", [], 0)
            if bracket + token not in ("()", "[]", "{}"):
                raise ValueError(f"the brackets of the equation {text!r}")
            if re.search(r"\\(frac|sum)", "".join(parts[start:])):  # tall brackets
                parts[start], parts[-1] = r"\Bigl" + parts[start], r"\Bigr" + parts[-1]
    if opened:
        raise ValueError(f"the brackets of the equation {text!r}")
    return found


def bare(text):
    """TeX without the outer brackets, which are redundant in a fraction and in an index."""
    if text.startswith("|"):
        return f"|{bare(text[1:-1])}|"
    text = text[1:-1] if re.fullmatch(rf"{BRACKET}|{{.*}}", text) else text
    return "".join(tex for _, parts in runs(text, inside=True) for tex in parts)


# ---- prose: docstrings and comments --------------------------------------------------------------

# Matches flags, files, shapes, papers, and symbols such as π_ref, y' or π(y|x). Names in code, such
# as max_length, are not symbols: the index of min, max or a small letter is a single letter.
INLINE = re.compile(
    r"(?P<code>`[^`]+`|(?<![\w-])--[a-z][a-z0-9-]*|\b[a-z_]+\.py\b"
    r"|\[\d*[A-Z][A-Z\d, +.-]*\])"
    r"|(?P<emphasis>(?<![\w*])\*[A-Za-z][^*\n]*\*(?![\w*]))"
    r"|(?P<paper>\b(?:arXiv:)?\d{4}\.\d{5}\b)"
    r"|(?P<math>(?<![\w.'-])(?:\d*[B-HJ-Zα-ωΠΣ]|[b-hj-z](?!_\w\w)"
    r"|(?:[AaIi]|min|max)(?=_\w(?!\w))|KL(?=\())(?:_(?:\{[\w+]+\}|<?[^\W_]+))?'?"
    r"(?:\^(?:\w|\([\w−+]+\)))?"
    r"(?:\((?:[\w|,.'·+−≤≻‖ <]|\([\w, ]*\))*\))?(?![\w'-]|\.\w))")
TERM = re.compile(r"(\[\d+\]|[a-z/][a-z_@/]*(?: [A-Z]+)?(?=  ))\s+(?![\s=])(.*(?:\n .*)*)")


def math(text, style=""):
    """Words, and symbols that KaTeX typesets in the browser; without KaTeX their text is shown."""
    html = ""
    for said, tex in runs(text):
        tex = "".join(tex).strip()
        tex = re.sub(r"(?<=[^,]) (?=\\text)", r"\\ ", tex)  # TeX drops other spaces beside words
        tex = re.sub(r"(\\text{\w+}) ", r"\1\\ ", tex)
        tex += "{}" * tex.endswith(("+", "-", "="))  # the term after the operator is a word
        end = said[len(said.rstrip()):]
        html += escape(said) if not tex else (
            f'<span data-tex="{escape(style + tex)}">{escape(said.rstrip())}</span>{end}')
    return html


def inline(text):
    """A paragraph of a docstring or comment as HTML."""
    html, end = "", 0
    for match in INLINE.finditer(text):
        html += escape(text[end:match.start()])
        said, end = match.group(), match.end()
        if match["math"]:
            html += math(said)
        elif match["emphasis"]:
            html += f"<em>{escape(said.strip('*'))}</em>"
        elif match["paper"]:
            html += f'<a href="https://arxiv.org/abs/{said.removeprefix("arXiv:")}">{said}</a>'
        else:
            html += f"<code>{escape(said.strip('`'))}</code>"
    return html + escape(text[end:])


def symbols(text):
    """The text of a Markdown page as HTML. Single Latin letters stay text, as they may be units."""
    html, end = "", 0
    for match in INLINE.finditer(text):
        is_symbol = match["math"] and not (len(match.group()) == 1 and match.group().isascii())
        html += escape(text[end:match.start()])
        html += typeset(match.group()) if is_symbol else escape(match.group())
        end = match.end()
    return html + escape(text[end:])


def typeset(text, style=""):
    """An equation as HTML; text that is not one is treated as a line of prose."""
    try:
        return math(text, style)
    except ValueError:
        return inline(text)


def spans(line, style):
    """A line of a set-apart block as HTML. Its parts are two or more spaces apart."""
    line = re.sub(r"\s{2,}([=+−])\s+", r" \1 ", line.strip())  # aligned by hand
    html, parts = "", re.split(r"\s{2,}", line)
    for number, part in enumerate(parts):
        margin = number and number + 1 == len(parts) and not parts[number - 1].endswith(",")
        html += '<span class="margin">' if margin else "<span>"
        for text in re.split(r"(\([A-Z]\w+ et al\..*?\))", part):
            is_equation = re.search("[=−]", text) or style and number == 0
            html += typeset(text, style) if is_equation else inline(text)
        html += "</span> "
    return html


def is_preformatted(text):
    """Whether a block is a command, code, a diagram, or a table of numbers."""
    cells = [cell for line in text.splitlines() for cell in re.split(r"\s{2,}", line.strip())]
    numbers = sum(bool(re.fullmatch(r"[−-]?\d[\d.,%]*", cell)) for cell in cells)
    is_code = re.search(r"[a-z]{2,}_[a-z]{2,}|\w\.[a-z]{3}|\[:|\b(True|False|None)\b", text)
    is_list = not TERM.sub("", text).strip()
    return bool(re.match("(python|torchrun|pip) ", text) or re.search("[─-╿◄►▲▼]", text)
                or numbers >= 4 or is_code and not is_list)


def apart(text):
    """A set-apart block as HTML: preformatted text, terms with their meanings, or equations."""
    if is_preformatted(text):
        return f"<pre>{escape(text)}</pre>"
    if TERM.sub("", text).strip():
        lines = [spans(line, r"\displaystyle ") for line in text.splitlines()]
        return "".join(f'<div class="eq">{line}</div>' for line in lines)
    terms = [(term, spans(re.sub(r"\n +", " ", said), "")) for term, said in TERM.findall(text)]
    return "<dl>" + "".join(f"<dt>{term}</dt><dd>{said}</dd>" for term, said in terms) + "</dl>"


def blocks(docstring):
    """Yields the paragraphs and set-apart blocks of a docstring as (is it set apart, text)."""
    lines = docstring.splitlines()
    for indented, group in groupby(lines, lambda line: line.startswith("    ") if line else None):
        if indented is not None:
            yield indented, "\n".join(line[4 * indented:] for line in group)


def paragraph(text):
    """A paragraph, or a list if it begins with a bullet."""
    if not text.startswith("- "):
        return f"<p>{inline(text)}</p>"
    points = re.split(r"\n- ", text.removeprefix("- "))
    return "<ul>" + "".join(f"<li>{inline(point)}</li>" for point in points) + "</ul>"


def prose(docstring):
    return "".join(apart(text) if indented else paragraph(text)
                   for indented, text in blocks(docstring))
