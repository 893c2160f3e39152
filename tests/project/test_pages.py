"""The annotated pages: site/build.py and site/equations.py."""
import ast
import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from html_helper import Page
from test_form import ROOM

sys.path.insert(0, str(ROOT / "site"))
import build  # noqa: E402
import equations  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build.build(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.name: Page(path) for path in site.glob("*.html")}


def test_every_page_is_in_the_index_and_every_link_leads_somewhere(site, pages):
    """Nothing is loaded from the network."""
    wanted = {*ROOM, "index", "readme", *("-".join(pair) for pair in build.NEIGHBORS)}
    wanted |= {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {f"{name}.html" for name in wanted} <= pages.keys()
    assert pages.keys() - {"index.html"} <= set(pages["index.html"].values("href"))
    ids = {name: page.values("id") for name, page in pages.items()}
    for name, page in pages.items():
        assert len(ids[name]) == len(set(ids[name])), name
        for file in page.values("src", "href", tags=["script", "link", "img"]):
            assert not re.match("[a-z]+:|//", file), (name, file)
        for reference in page.values("href", "src"):
            path, _, anchor = reference.partition("#")
            if not re.match("[a-z]+:", reference):
                assert not path or (site / path).is_file(), (name, reference)
                assert not anchor or anchor in ids[path or name], (name, reference)
    for path in site.rglob("*.css"):
        for name in re.findall(r"url\(([^)]*)\)", path.read_text()):
            assert (path.parent / name.strip("'\"")).is_file(), name


@pytest.mark.parametrize("script", sorted(build.SOURCES))
def test_the_code_of_a_script_is_on_its_page_once_and_in_order(script, pages):
    source, prose = build.SOURCES[script], set()
    for node in [ast.parse(source), *ast.parse(source).body]:
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            prose |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    code = [[number, line] for number, line in enumerate(source.splitlines(), 1)
            if number not in prose and line.strip() and not line.strip().startswith("#")]
    shown = [[int(x.attributes["data-number"]), x.text.rstrip("\n")]
             for x in pages[f"{script}.html"].elements if x.attributes.get("class") == "line"]
    assert [line for line in shown if line[1].strip()] == code


def test_imports_flags_and_housekeeping_are_folded(site):
    text = (site / "grpo.html").read_text().partition("<main>")[2]
    first, last = re.findall(r"<details>(.*?)</details>", text, re.S)
    assert "import torch" in re.sub("<[^>]*>", "", first) and 'id="make_flags"' in first
    assert '<h3 id="finish">' in last and '<h3 id="train">' not in first + last


def test_the_page_of_a_script_offers_its_exercises(site):
    for name, entry in build.EXERCISES.items():
        script = name.partition(".")[0]
        text = (site / f"{script}.html").read_text()
        assert f"<dt>python exercise.py {name}</dt>" in text
        assert (f"--bug {script}<" in text) or "bug" not in entry
    assert 'class="exercises"' not in (site / "common.html").read_text()
    index = (site / "index.html").read_text()
    assert "exercises that grade themselves" in index and "](" not in index


@pytest.mark.parametrize("pair", build.NEIGHBORS, ids="-".join)
def test_counterparts_exist_and_stand_beside_each_other(pair, site):
    text = (site / f"{'-'.join(pair)}.html").read_text()
    assert "token_logps</b> is identical in both" in text or "reward_model" in pair
    for left, right in build.NEIGHBORS[pair].items():
        assert f">{left} | {right}</h2>" in text, (left, right)


# ---- equations -----------------------------------------------------------------------------------

def test_katex_takes_all_of_it(pages):
    """KaTeX renders every piece of TeX on every page, with warnings as errors."""
    if not shutil.which("node"):
        pytest.skip("needs node to run KaTeX outside a browser")
    tex = sorted({tex for page in pages.values() for tex in page.values("data-tex")})
    assert len(tex) > 100
    program = ("const katex = require(process.argv[1]); JSON.parse(process.argv[2]).forEach("
               "(tex) => katex.renderToString(tex, {strict: 'error'}))")
    katex = ROOT / "site/assets/katex/katex.min.js"
    subprocess.run(["node", "-e", program, str(katex), json.dumps(tex)], check=True)


@pytest.mark.parametrize("text, tex", [
    ("−log σ(h)", r"-\log \sigma(h)"), ("π_ref(y|x)", r"\pi_{\text{ref}}(y\mid x)"),
    ("V_{t+1}", "V_{t+1}"), ("y_<t", "y_{<t}"), ("(γλ)^l", r"(\gamma\lambda)^{l}"),
    ("Σ_i 1/|o_i|", r"\sum_{i}\frac{1}{|o_{i}|}"), ("1e-4", "10^{-4}"), ("e^0.65", "e^{0.65}"),
    ("(r − mean(r)) / std(r)", r"\frac{r-\operatorname{mean}(r)}{\operatorname{std}(r)}"),
    ("exp(r(x, y) / β)", r"\exp\Bigl(\frac{r(x,y)}{\beta}\Bigr)"),
    ("KL(π ‖ π_ref) / β", r"\frac{\operatorname{KL}(\pi\,\Vert\,\pi_{\text{ref}})}{\beta}")])
def test_translations(text, tex):
    """Compared without the spaces that TeX ignores."""
    found = re.search('data-tex="(.*)"', equations.math(text))[1]
    assert re.sub(r"(?<!\\) ", "", html.unescape(found)) == re.sub(r"(?<!\\) ", "", tex)


def test_what_is_no_mathematics_or_cannot_be_translated_is_shown_as_it_is():
    """Names and units; code, diagrams and tables, with their spaces; broken formulas."""
    for text in "max_length", "min_new_tokens", "loss_mask", "p_values", "2 s":
        inline = equations.inline(text) if "_" in text else ""
        assert "data-tex" not in equations.symbols(f"the {text} of") + inline, text
    for text in ("logps = model(input_ids).logits[:, :-1]", "[([], False), ([17, 2], True)]",
                 "python sft.py", "a ──► b = c", "x    1    2    3    4"):
        assert equations.apart(text) == f"<pre>{html.escape(text)}</pre>"
    for text in "x = ∂y", "x = (y", "x = y)", "x = y /":
        assert html.escape(text) in re.sub("<[^>]*>", "", equations.apart(text))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = subprocess.run([sys.executable, ROOT / "site/build.py", "--output", tmp_path / "file"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: building the pages in ")
    assert done.stderr.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"
