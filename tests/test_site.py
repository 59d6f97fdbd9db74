"""The site in a browser: formulas are set, nothing is cut or comes from another host."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("index", "comparison", "methods/infllm", "methods/armt", "howto/serve")
WIDTHS = (1280, 390)  # a desktop's and a telephone's

pytestmark = pytest.mark.full

# What is wider than its container, and neither it nor anything around it scrolls.
CUT = """() => {
  const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const wrong = [];
  const page = document.querySelector(".md-content");
  for (const element of page.querySelectorAll("pre, code, table, img, .katex-display")) {
    let around = element, held = false;
    const box = element.getBoundingClientRect();
    if (!box.width) continue;
    while (!around.classList.contains("md-content")) {
      held ||= scrolls(around);
      around = around.parentElement;
    }
    const over = box.right - around.getBoundingClientRect().right;
    if (over > 1 && !held) wrong.push([element.tagName, element.textContent.slice(0, 60), over]);
    const hidden = getComputedStyle(element).overflowX === "hidden";
    if (hidden && element.scrollWidth > element.clientWidth + 1)
      wrong.push([element.tagName, "cut", element.scrollWidth - element.clientWidth]);
  }
  return wrong;
}"""

# What has to be scrolled sideways, which looks cut.
SCROLLED = """() => [...document.querySelectorAll(
  ".md-content pre > code, .md-content .md-typeset__scrollwrap, .md-content .katex-display"
)].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site, built now and served from this machine."""
    pytest.importorskip("mkdocs", reason="needs pip install 'memwrap[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs pip install 'memwrap[browser]'"
    )
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on the path (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_page(site, browser, tmp_path, name, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda got: got.status >= 400 and failed.append(got.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(f"{site}/{name}.html", wait_until="networkidle")
    own = (site, "data:", "blob:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert failed == []
    formulas = page.locator(".arithmatex").count()
    assert page.locator(".arithmatex > .katex, .arithmatex > .katex-display").count() == formulas
    assert (formulas > 0) == name.startswith("methods/")
    assert page.locator(".katex-error").count() == 0
    # Formulas and code aside, nothing of TeX is left.
    text = page.evaluate(
        "() => { const all = document.querySelector('.md-content').cloneNode(true);"
        "all.querySelectorAll('.katex, code, pre').forEach((e) => e.remove());"
        "return all.textContent; }"
    )
    assert not [mark for mark in ("$$", "\\[", "\\(", "\\frac") if mark in text]
    assert page.evaluate(CUT) == []
    assert width < 1280 or page.evaluate(SCROLLED) == []
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    shot = page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    assert len(shot) > 20_000  # something is there
    page.close()
