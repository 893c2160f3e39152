// Typesets the equations. The text of each stays in `title`, and in the page where this does not run.
for (const span of document.querySelectorAll("[data-tex]")) {
  katex.render(span.dataset.tex, span);
}

// A link may lead into what is folded; on a phone the lists of pages and headings start folded.
function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.closest("details")) {
    target.closest("details").open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", unfold);
unfold();
if (matchMedia("(max-width: 60rem)").matches) {
  for (const list of document.querySelectorAll("nav details")) list.open = false;
}

// Paper cannot be unfolded.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("main details")) folded.open = true;
});

// A table of many columns becomes a list where the screen is narrow.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("th")].map((head) => head.textContent);
  table.classList.toggle("tall", heads.length > 3);
  for (const row of table.tBodies[0].rows) {
    [...row.cells].forEach((cell, i) => { cell.dataset.label = heads[i]; });
  }
}
