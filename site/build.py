"""Builds the annotated pages: every script with its prose and typeset equations beside its code.

    python site/build.py                   # writes site/pages/; open site/pages/index.html
    python site/build.py --output pages    # elsewhere

All words come from the docstrings and comments of the scripts, from README.md, from docs/*.md, from
the catalogue of exercises, and from site/templates. The pages need no network.
"""
import argparse
import ast
import functools
import io
import re
import shutil
import sys
import tokenize
import tomllib
from difflib import SequenceMatcher
from pathlib import Path
from string import Template

from equations import inline, prose, symbols, typeset
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent
METHODS = ["sft", "reward_model", "dpo", "kto", "online_dpo", "ppo", "grpo", "prm", "distill",
           "agent"]  # in the order to read them in
ORDER = [*METHODS, "common", "pairs", "evaluate", "plot", "chat", "exercise"]
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in ORDER
           if (ROOT / f"{name}.py").exists()}
# Scripts that are shown side by side, and functions that play the same role under different names.
NEIGHBORS = {
    ("ppo", "grpo"): {"token_rewards": "token_kl", "gae": "group_advantages",
                      "policy_loss": "token_losses", "minibatch_gradients": "group_gradients"},
    ("dpo", "kto"): {"encode_pair": "encode_labeled", "preference_loss": "kto_loss",
                     "pair_losses": "answer_losses"},
    ("grpo", "agent"): {"encode_row": "encode_question", "join_answers": "join_conversations",
                        "group_gradients": "conversation_gradients"},
    ("reward_model", "dpo"): {"encode_comparison": "encode_pair", "reward_loss": "preference_loss",
                              "sequence_rewards": "token_logps",
                              "comparison_losses": "pair_losses"}}
EXERCISES = tomllib.loads((ROOT / "checks/catalogue.toml").read_text())
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKDOWN = {file.stem.lower(): file for file in PROSE}
PAGES = {file: f"{name}.html" for name, file in MARKDOWN.items()}
PAGES |= {ROOT / f"{name}.py": f"{name}.html" for name in SOURCES}


def link(page, text=None, anchor=""):
    return f'<a href="{page}.html{anchor}">{text or page}</a>'


def slug(title):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


# ---- scripts: code beside its prose --------------------------------------------------------------

@functools.cache
def functions(source):
    """{name: (first, last line)} of the functions at the top level, decorators included."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: (min([node.lineno] + [d.lineno for d in node.decorator_list]),
                        node.end_lineno) for node in nodes}


def pieces(source):
    """The pieces of a file in order, each as [comment, docstring, function, numbers of code lines].

    A piece begins at a comment on lines of its own, at a function and after a heading.
    """
    tree, docs = ast.parse(source), {}
    for node in [tree] + [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        if ast.get_docstring(node):
            lines = range(node.body[0].lineno, node.body[0].end_lineno + 1)
            docs |= dict.fromkeys(lines, ast.get_docstring(node))
    starts = {first: name for name, (first, _) in functions(source).items()}
    comments = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT and not token.line[:token.start[1]].strip()}
    found = [["", "", "", []]]
    for number, line in enumerate(source.splitlines(), 1):
        begins = found[-1][3] and (number in comments or number in starts)
        if begins or line.startswith("# ----") or found[-1][0].startswith("# ----"):
            found.append(["", "", "", []])
        if number in comments:
            found[-1][0] += line.strip() + "\n"
        elif number in docs:
            found[-1][1] = docs[number]
        elif line.strip() or number - 1 in found[-1][3]:
            found[-1][2] = starts.get(number, found[-1][2])
            found[-1][3].append(number)
    return found


@functools.cache
def colored(source):
    return highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).split("\n")


def code(source, numbers, anchor="{}"):
    """Colored lines; a line that is too long for the screen continues below its indentation."""
    lines = colored(source)
    while numbers and not lines[numbers[-1] - 1]:
        numbers = numbers[:-1]
    html = ""
    for number in numbers:
        text = re.sub("<[^>]+>", "", lines[number - 1])
        indent = len(text) - len(text.lstrip())
        html += (f'<span class="line" {anchor.format(number)} data-number="{number}" '
                 f'style="--indent:{indent}ch">{lines[number - 1]}\n</span>')
    return f'<pre class="code">{html}</pre>' * bool(html)


def copies(script, function):
    """Links to the functions of the same name in other scripts."""
    texts = {}
    for name, source in SOURCES.items():
        if function in functions(source):
            first, last = functions(source)[function]
            texts[name] = source.splitlines()[first - 1:last]
    html = ""
    for words, same in ("identical in ", True), ("different in ", False):
        found = [link(name, anchor=f"#{function}") for name in texts
                 if name != script and (texts[name] == texts[script]) == same]
        html += f'<p class="also">{words}{", ".join(found)}</p>' * bool(found)
    return html


def exercises(script):
    """The exercises of a script with their commands, folded; "" if it has none."""
    mine = {name: entry for name, entry in EXERCISES.items() if name.split(".")[0] == script}
    if not mine:
        return ""
    offers = {}
    for name, entry in mine.items():
        function = entry.get("function", name.split(".")[1])
        title = f'<a href="#{function}">{inline(entry["title"])}</a>'
        offers[name] = f"{title} ({entry['difficulty']}). {inline(entry['teaches'])}"
    offers[f"--predict {script}"] = "three questions, each with a number or a word as the answer"
    if any("bug" in entry for entry in mine.values()):
        offers[f"--bug {script}"] = "a mistake to be found by its curves"
    html = "".join(f"<dt>python exercise.py {words}</dt><dd><span>{said}</span></dd>"
                   for words, said in offers.items())
    study = link("learning", "How to study with this repository")
    return f"""<details class="exercises"><summary>Exercises: write parts of this script
        yourself, and have them checked</summary>
        <p>{study} explains how the exercises work.</p><dl>{html}</dl></details>"""


LEGEND = """<p class="legend">Left: docstrings and comments. Right: the code that they belong to,
with the line numbers of the file. Links below the name of a function lead to the scripts with an
identical copy of it, or with a different function of that name. Imports, flags and housekeeping are
folded; click to open them.</p>"""


def script_page(script):
    """The HTML of a script's page, and the links of its side index."""
    beside = [link(f"{a}-{b}", f"{a} | {b}") for a, b in NEIGHBORS if script in (a, b)]
    html = f"<h1>{script}.py</h1>" + f"<p>Side by side: {', '.join(beside)}</p>" * bool(beside)
    html += LEGEND + exercises(script)
    index = folded = ""
    found = pieces(SOURCES[script])
    is_heading = [comment.startswith("# ----") for comment, _, _, _ in found]
    first_heading = is_heading.index(True) if True in is_heading else 0
    for number, (comment, docstring, function, numbers) in enumerate(found):
        shown = code(SOURCES[script], numbers, 'id="L{}"')
        if comment.startswith("# ----"):
            if folded:
                html += f"<details><summary>Imports and flags</summary>{folded}</details>"
                folded = ""
            title, _, more = comment.strip("#- \n").partition(": ")
            index += f'<a class="part" href="#part-{slug(title)}">{title}</a>'
            head = f'<h2 id="part-{slug(title)}">{title}</h2>'
            html += f"<details><summary>{head}</summary>" if title == "housekeeping" else head
            html += f"<p>{inline(more)}</p>" * bool(more)
            continue
        said = prose(re.sub("^# ?", "", comment, flags=re.M)) + prose(docstring)
        if function:
            index += f'<a href="#{function}">{function}</a>'
            said = f'<h3 id="{function}">{function}</h3>{said}{copies(script, function)}'
        elif docstring:  # the docstring of the script itself
            html += f'<div class="top">{said}</div>'
            said = ""
        row = f'<div class="row"><div class="prose">{said}</div><div>{shown}</div></div>'
        if number < first_heading:
            folded += row
        else:
            html += row
    return html + "</details>" * (html.count("<details") - html.count("</details>")), index


# ---- scripts side by side ------------------------------------------------------------------------

def units(source):
    """{name: lines as (number, text)} of each function, and of the code between functions."""
    found, rest, (docstring, *body) = {}, "imports and flags", ast.parse(source).body
    end = docstring.end_lineno
    for node in body:
        rest = "constants" if isinstance(node, ast.FunctionDef) else rest
        found.setdefault(getattr(node, "name", rest), []).extend(
            (number, line) for number, line in enumerate(source.splitlines(), 1)
            if end < number <= node.end_lineno and line and not line.startswith("# ----"))
        end = node.end_lineno
    return found


def in_pairs(left, right, counterparts):
    """Yields (left name, right name) in the order of both lists; None if one is missing."""
    partners, lone = [counterparts.get(name, name) for name in left], list(right)
    for name, partner in zip(left, partners, strict=True):
        before = right.index(partner) if partner in right else 0
        for other in [other for other in right[:before] if other in lone]:
            lone.remove(other)
            if other not in partners:
                yield None, other
        yield name, partner if partner in right else None
    yield from [(None, other) for other in lone if other not in partners]


def compare_page(left, right):
    """The HTML of two scripts side by side, and its index; identical functions are folded."""
    a, b = units(SOURCES[left]), units(SOURCES[right])
    head = f'<h1 class="neighbors">{link(left)} | {link(right)}</h1>'
    head += f"""<p class="legend">Lines that both scripts have are pale. Lines that only
        {left}.py has are marked at the left, lines that only {right}.py has at the right, in the
        colors of the title. Functions that are identical in both are folded.</p>"""
    docstrings = ""
    for script in left, right:
        docstrings += f"<div>{prose(ast.get_docstring(ast.parse(SOURCES[script])))}</div>"
    html, index = f'{head}<div class="hunk top">{docstrings}</div>', ""
    for name, other in in_pairs(list(a), list(b), NEIGHBORS[left, right]):
        lines, others = a.get(name, []), b.get(other, [])
        texts = [text for _, text in lines], [text for _, text in others]
        if texts[0] == texts[1]:
            html += f"<details><summary><b>{name}</b> is identical in both</summary>"
            html += code(SOURCES[left], [number for number, _ in lines]) + "</details>"
            continue
        title = f"{name} | {other}"
        if name == other or not (name and other):
            title = name or other
        index += f'<a href="#{slug(title)}">{title}</a>'
        html += f'<h2 id="{slug(title)}">{title}</h2>'
        html += f"<p>Only in {right if name is None else left}</p>" * (None in (name, other))
        for change, i, k, j, m in SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
            shown = [code(SOURCES[left], [number for number, _ in lines[i:k]]),
                     code(SOURCES[right], [number for number, _ in others[j:m]])]
            html += f'<div class="hunk {change}"><div>{shown[0]}</div><div>{shown[1]}</div></div>'
    return html, index


# ---- all pages -----------------------------------------------------------------------------------

def markdown_page(file, output):
    """The HTML and index of a Markdown page. Linked files that have no page are copied."""
    parser = MarkdownIt().enable("table")
    tokens = parser.parse(file.read_text())
    index = ""
    set_equations(tokens)
    for heading, text in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            heading.attrSet("id", slug(text.content))
            index += f'<a href="#{slug(text.content)}">{text.content}</a>' * (heading.tag == "h2")

    def linked(match):
        path, mark, anchor = match[2].partition("#")
        target = (file.parent / path).resolve()
        if target.is_file() and target not in PAGES:
            copy = output / "files" / target.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)
        page = PAGES.get(target, f"files/{target.relative_to(ROOT)}")
        return f'{match[1]}="{page}{mark}{anchor}"'

    html = f'<div class="page">{parser.renderer.render(tokens, parser.options, {})}</div>'
    html = re.sub(r'\b(href|src)="(?![a-z]+:|#)([^"]+)"', linked, html)
    html = html.replace("<table>", '<div class="wide"><table>')
    return html.replace("</table>", "</table></div>"), index


def set_equations(tokens):
    """Turns symbols and columns of formulas in parsed Markdown into TeX."""
    heads, column = [], 0
    for token, content in zip(tokens, tokens[1:], strict=False):
        if token.type == "thead_open":
            heads = []
        elif token.type == "tr_open":
            column = 0
        elif token.type == "th_open":
            heads.append(content.content)
        elif token.type == "td_open":
            is_formula = heads[column] in ("loss", "formula", "symbol")
            column += 1
            for child in content.children:
                has_equation = re.search("[=−Σ^/|]|[α-ω]", child.content)
                if is_formula and has_equation and child.type == "text":
                    child.type, child.content = "html_inline", typeset(child.content)
        if token.type == "inline":
            for child in token.children:
                if child.type == "text":
                    child.type, child.content = "html_inline", symbols(child.content)


def titles():
    """Yields (kind, {page: title}) for all pages except the index."""
    methods = [name for name in SOURCES if name in METHODS]
    yield "Methods, in the order to read them", {name: f"{name}.py" for name in methods}
    yield "Tools", {name: f"{name}.py" for name in SOURCES if name not in METHODS}
    yield "Side by side", {f"{a}-{b}": f"{a} | {b}" for a, b in NEIGHBORS}
    first_lines = {name: file.read_text().splitlines()[0] for name, file in MARKDOWN.items()}
    yield "More", {name: line.strip("# ") for name, line in first_lines.items()}


def index_page():
    """The HTML of the start page: a summary, where to start, and a line about every page."""
    title, paragraph = MARKDOWN["readme"].read_text().split("\n\n")[:2]
    summary = re.sub(r"\[([^]]*)\]\(([^)]*)\)", lambda found: (
        f'<a href="{PAGES.get(ROOT / found[2], found[2])}">{found[1]}</a>'), prose(paragraph))
    html = f"<h1>{title.strip('# ')}</h1>{summary}"
    html += (SITE / "templates/start.html").read_text()
    for kind, pages in titles():
        html += f"<h2>{kind}</h2><dl>"
        for page, name in pages.items():
            docstring = ast.get_docstring(ast.parse(SOURCES.get(page, ""))) or ""
            said = inline(docstring.split("\n\n")[0])
            html += f"<dt>{link(page, name)}</dt><dd><span>{said}</span></dd>"
        html += "</dl>"
    return f'<div class="page">{html}</div>', ""


def build(output):
    """Writes the pages and their assets to a folder."""
    shutil.copytree(SITE / "assets", output / "assets", dirs_exist_ok=True)
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
    colors = HtmlFormatter(style="friendly").get_style_defs(".code")
    style = f"{colors}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    (output / "assets/colors.css").write_text(style)
    pages = {name: markdown_page(file, output) for name, file in MARKDOWN.items()}
    pages |= {name: script_page(name) for name in SOURCES} | {"index": index_page()}
    pages |= {f"{a}-{b}": compare_page(a, b) for a, b in NEIGHBORS}
    template = Template((SITE / "templates/page.html").read_text())
    for page, (html, index) in pages.items():
        html = re.sub(r"<code>(\w+)\.py</code>(?!</a>)", lambda found: link(found[1], found[0])
                      if found[1] in SOURCES else found[0], html)
        every = "".join(link(name, title) for _, kind in titles() for name, title in kind.items())
        (output / f"{page}.html").write_text(
            template.substitute(title=page, pages=every, index=index, body=html))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=SITE / "pages", help="folder of the pages")
    folder = parser.parse_args().output
    try:
        build(folder)
    except (OSError, ValueError) as error:
        print(f"error: building the pages in {folder}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"open {folder / 'index.html'}")
