"""The annotated pages: site/build.py and site/equations.py."""
import ast
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_form import ROOM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "site"))
import build  # noqa: E402
import equations  # noqa: E402

SCRIPTS = sorted(build.SOURCES)
each_script = pytest.mark.parametrize("script", SCRIPTS)
each_pair = pytest.mark.parametrize("pair", build.NEIGHBOURS, ids="-".join)
VOID = ("meta", "link", "img", "br", "hr", "input")


class Page(HTMLParser):
    """What a page holds: ids, references, TeX, code as (number, text), the text that is no code."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.tex, self.lines, self.prose = [], [], [], [], ""
        self.sources = []  # files that the browser loads by itself
        self.open = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.open += [] if tag in VOID else [(tag, found)]
        self.ids += [found["id"]] if "id" in found else []
        self.tex += [found["data-tex"]] if "data-tex" in found else []
        self.references += [found[name] for name in ("href", "src") if name in found]
        if tag in ("script", "link", "img"):
            self.sources.append(found.get("src") or found["href"])
        if found.get("class") == "line":
            self.lines.append([int(found["data-number"]), ""])

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop()[0] == tag  # <img /> has no end of its own

    def handle_data(self, text):
        if any(found.get("class") == "line" for _, found in self.open):
            self.lines[-1][1] += text
        elif any(tag == "main" for tag, _ in self.open):
            self.prose += text


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build.build(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.name: Page(path.read_text()) for path in site.glob("*.html")}


def test_every_script_markdown_and_pair_of_neighbours_has_a_page(pages):
    wanted = {*ROOM, "index", "readme", *("-".join(pair) for pair in build.NEIGHBOURS)}
    wanted |= {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {f"{name}.html" for name in wanted} <= pages.keys()
    index = pages["index.html"].references
    assert all(name in index for name in pages if name != "index.html")


def test_every_link_leads_somewhere(site, pages):
    """To a page of the site and an id on it, or to another host, where no id is twice on a page."""
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), name
        for reference in page.references:
            path, _, anchor = reference.partition("#")
            if not re.match("[a-z]+:", reference):
                assert not path or (site / path).is_file(), (name, reference)
                assert not anchor or anchor in pages[path or name].ids, (name, reference)


def test_nothing_is_loaded_from_the_network(site, pages):
    """Nor what the style sheets name; the fonts that they name are there."""
    for name, page in pages.items():
        assert page.sources and not [x for x in page.sources if re.match("[a-z]+:|//", x)], name
    for path in site.rglob("*.css"):
        text = path.read_text()
        assert "@import" not in text
        for name in re.findall(r"url\(([^)]*)\)", text):
            assert (path.parent / name.strip("'\"")).is_file(), name
    assert len(list(site.glob("assets/katex/fonts/*.woff2"))) == 20
    assert (site / "assets/katex/LICENSE").is_file()


def said_and_done(source):
    """What must stand as prose (docstrings and comments), and as code, {number: line}."""
    lines, tree = source.splitlines(), ast.parse(source)
    done = {number: line for number, line in enumerate(lines, 1)
            if line.strip() and not line.strip().startswith("#")}
    nodes = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef))]
    docs = [node for node in nodes if ast.get_docstring(node)]
    for node in docs:
        for number in range(node.body[0].lineno, node.body[0].end_lineno + 1):
            done.pop(number, None)
    comments = [line.strip("# ") for line in lines if re.match(r" *# (?!----)", line)]
    return [ast.get_docstring(node) for node in docs] + comments, done


def bare(text):
    return re.sub(r"[\s`]", "", text)


@each_script
def test_a_script_is_on_its_page_once_and_to_the_letter(script, pages):
    """Each line of code, in its order; each docstring and each comment above a line."""
    said, done = said_and_done(build.SOURCES[script])
    page = pages[f"{script}.html"]
    assert [(n, text.rstrip("\n")) for n, text in page.lines if text.strip()] == list(done.items())
    for text in said:
        assert bare(text) in bare(page.prose), text


@each_script
def test_a_function_stands_beside_its_docstring(script, site):
    text = (site / f"{script}.html").read_text()
    for node in ast.parse(build.SOURCES[script]).body:
        if isinstance(node, ast.FunctionDef):
            assert text.count(f'<h3 id="{node.name}">') == 1
            said, beside, shown = text.partition(f'<h3 id="{node.name}">')[2].partition(
                '</div><div><pre class="code">')
            assert beside and bare(ast.get_docstring(node) or "") in bare(
                html.unescape(re.sub("<[^>]*>", "", said)))
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            assert re.match(f'<span class="line" id="L{first}" ', shown)


def test_functions_of_one_name_are_linked(site):
    """Those with the same text, and those of a script's own form."""
    text = (site / "dpo.html").read_text()
    row = text.partition('<h3 id="token_logps">')[2].partition("<pre")[0]
    assert "the same in" in row and "form of its own" not in row
    assert all(f'href="{name}.html#token_logps"' in row for name in ("sft", "kto", "ppo", "grpo"))
    row = text.partition('<h3 id="train">')[2].partition("<pre")[0]
    assert "in a form of its own in" in row and 'href="kto.html#train"' in row


def test_housekeeping_is_folded(site):
    text = (site / "grpo.html").read_text()
    folded = text.partition("<main>")[2].partition("<details>")[2].partition("</details>")[0]
    assert '<h2 id="part-housekeeping">' in folded and '<h3 id="finish">' in folded
    assert '<h3 id="train">' not in folded


@each_pair
def test_neighbours_are_whole_and_what_they_share_stands_once(pair, pages, site):
    """Side by side: every line of both, but those of functions that are the same only once."""
    text = (site / f"{'-'.join(pair)}.html").read_text()
    left, right = (build.SOURCES[name] for name in pair)
    units = [build.units(source) for source in (left, right)]
    shared = [name for name in units[0] if name in units[1]
              and [x for _, x in units[0][name]] == [x for _, x in units[1][name]]]
    assert re.findall(r"<summary><b>(.*)</b> is the same", text) == shared
    assert {"token_logps", "finish"} & set(shared)
    shown = pages[f"{'-'.join(pair)}.html"].lines
    wanted = []
    for source, unit in zip((left, right), units, strict=True):
        start = ast.parse(source).body[0].end_lineno
        once = [number for name in shared for number, _ in unit[name] if source is right]
        wanted += [[number, line + "\n"] for number, line in enumerate(source.splitlines(), 1)
                   if number > start and number not in once and line and "# ----" not in line]
    assert sorted(shown) == sorted(wanted)
    for left, right in build.NEIGHBOURS[pair].items():
        assert f'<h2 id="{build.slug(f"{left} | {right}")}">{left} | {right}</h2>' in text


def test_lists_are_put_beside_each_other():
    """In the order of both, each name once, a counterpart beside its own."""
    found = list(build.in_pairs(["a", "b", "c", "z"], ["a", "x", "y", "c", "w"], {"b": "y"}))
    assert found == [("a", "a"), (None, "x"), ("b", "y"), ("c", "c"), ("z", None), (None, "w")]


# ---- equations -----------------------------------------------------------------------------------

UNICODE = {tex.strip(): text for text, tex in equations.TEX.items() if tex.startswith("\\")}


def undone(tex):
    """The symbols of TeX as text, without brackets, bars and spaces."""
    for command in sorted(UNICODE, key=len, reverse=True):
        tex = tex.replace(command + " ", UNICODE[command]).replace(command, UNICODE[command])
    tex = re.sub(r"\\(displaystyle|frac|text|operatorname|Big[lr]|[{}, ])", "", tex)
    assert "\\" not in tex, tex
    return re.sub(r"[\s{}()\[\]|_^/]", "", tex.replace("-", "−"))


def set_apart(script):
    """The lines of equations and of lists in the docstring of a script."""
    docstring = ast.get_docstring(ast.parse(build.SOURCES[script]))
    blocks = [text for indented, text in equations.blocks(docstring) if indented]
    return [line for text in blocks if not text.startswith("python ") for line in text.splitlines()]


@each_script
def test_every_equation_is_translated_and_nothing_is_lost(script, pages):
    """Each typeset part has the symbols of its text, in their order."""
    for line in set_apart(script):
        if "=" in line or "−" in line:
            assert "data-tex" in equations.apart(line), line
    text = equations.prose(ast.get_docstring(ast.parse(build.SOURCES[script])))
    for tex, said in re.findall(r'<span data-tex="([^"]*)">(.*?)</span>', text):
        said = re.sub(r"[\s{}()\[\]|_^/]", "", html.unescape(said).replace("²", "2"))
        assert undone(html.unescape(tex)) == said, tex


def test_katex_takes_all_of_it(pages):
    """Every piece of TeX on every page, by KaTeX itself, with its warnings as errors."""
    if not shutil.which("node"):
        pytest.skip("needs node to run KaTeX outside of a browser")
    tex = sorted({tex for page in pages.values() for tex in page.tex})
    assert len(tex) > 100
    program = ("const katex = require(process.argv[1]); JSON.parse(process.argv[2]).forEach("
               "(tex) => katex.renderToString(tex, {strict: 'error'}))")
    katex = ROOT / "site/assets/katex/katex.min.js"
    subprocess.run(["node", "-e", program, str(katex), json.dumps(tex)], check=True)


@pytest.mark.parametrize("text, tex", [
    ("−log σ(h)", r"-\log \sigma(h)"), ("π_ref(y|x)", r"\pi_{\text{ref}}(y\mid x)"),
    ("V_{t+1}", "V_{t+1}"), ("y_<t", "y_{<t}"), ("(γλ)^l", r"(\gamma\lambda)^{l}"),
    ("π^(1−m)", r"\pi^{1-m}"), ("Σ_i 1/|o_i|", r"\sum_{i}\frac{1}{|o_{i}|}"),
    ("(r − mean(r)) / std(r)", r"\frac{r-\operatorname{mean}(r)}{\operatorname{std}(r)}"),
    ("exp(r(x, y) / β)", r"\exp\Bigl(\frac{r(x,y)}{\beta}\Bigr)"),
    ("½ E x²", r"\tfrac12\mathbb{E}\,x^2"),
    ("max(0, mean of x)", r"\max(0,\text{mean}\ \text{of}\ x)"), ("k3_t", r"\operatorname{k3}_{t}"),
    ("KL(π ‖ π_ref) / β", r"\frac{\operatorname{KL}(\pi\,\Vert\,\pi_{\text{ref}})}{\beta}")])
def test_translations(text, tex):
    """But for spaces that TeX does not show."""
    found = re.search('data-tex="(.*)"', equations.math(text))[1]
    assert re.sub(r"(?<!\\) ", "", html.unescape(found)) == re.sub(r"(?<!\\) ", "", tex)


def test_words_are_no_mathematics():
    """Between equations they stay text; (eq. 7) goes to the margin, and so does the last remark."""
    text = equations.apart("loss = −log σ(h) if y is desirable        (eq. 7)")
    assert text.startswith('<div class="eq"><span>loss <span data-tex=') and "> if <" in text
    assert '<span class="margin">(eq. 7)</span>' in text
    assert "margin" not in equations.apart("a = b,   c = d")


@pytest.mark.parametrize(
    "line", ["x = ∂y", "x = (y", "x = y)", "x = [y)", "x = y /", "x = y_", "x ^ y", "x = (y / ∂)"])
def test_what_cannot_be_translated_is_refused(line):
    with pytest.raises(ValueError):
        equations.apart(line)


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_writes_the_site_or_says_in_one_line_why_not(tmp_path):
    command = [sys.executable, str(ROOT / "site/build.py"), "--output"]
    done = subprocess.run([*command, tmp_path / "new/site"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "new/site/index.html").is_file(), done.stderr
    (tmp_path / "file").write_text("mine")
    done = subprocess.run([*command, tmp_path / "file"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: building the pages in ")
    assert done.stderr.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"
