"""Open pages in Chromium as a phone (400 pixels) and a wide screen (1600) show them, and say what is wrong with them:
wider than the screen, letters of a drawing too small or over one another, a broken picture, a request to the network.

Needs a Chromium on PATH, and playwright: pip install -c constraints.txt -e '.[browser]'. `make look` calls it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kanyun.cli.parser import Parser
from kanyun.cli.progress import track
from kanyun.errors import UserError, run_cli

WIDTHS = (400, 1600)
# Sentences on a page that is laid out. What lies in something that scrolls or clips does not widen the page.
_LOOK = """() => {
  const found = [], width = document.documentElement.clientWidth;
  const box = element => element.getBoundingClientRect();
  const words = text => JSON.stringify(text.textContent.slice(0, 40));
  if (document.scrollingElement.scrollWidth > width + 1)
    found.push(`the page is ${document.scrollingElement.scrollWidth} pixels wide`);
  for (const image of document.images)
    if (image.complete && !image.naturalWidth) found.push(`no picture: ${image.src.slice(0, 80)}`);
  for (const svg of document.querySelectorAll('svg')) {
    const texts = [...svg.querySelectorAll('text')].filter(text => box(text).width);
    for (const [index, text] of texts.entries()) {
      const matrix = text.getScreenCTM(), mine = box(text), edge = box(svg);
      const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b);
      if (size < 8) found.push(`${words(text)} has letters of ${size.toFixed(1)} pixels`);
      if (mine.left < edge.left - 1 || mine.right > edge.right + 1) found.push(`${words(text)} leaves its drawing`);
      for (const other of texts.slice(index + 1)) {
        const across = Math.min(mine.right, box(other).right) - Math.max(mine.left, box(other).left);
        const down = Math.min(mine.bottom, box(other).bottom) - Math.max(mine.top, box(other).top);
        if (across > 1 && down > 3) found.push(`${words(text)} lies over ${words(other)}`);
      }
    }
  }
  return found;
}"""


def look(browser: Any, page: Path, width: int, shot: Path | None = None) -> list[str]:
    """Return what is wrong with `page`, a sentence each. `shot`: where its picture goes."""
    found: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900})

    def note(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            found.append(f"asks for {request.url}")

    try:
        tab.on("request", note)
        tab.on("pageerror", lambda error: found.append(f"its script fails: {error}"))
        tab.goto(page.absolute().as_uri())
        found += tab.evaluate(_LOOK)
        if shot:
            tab.screenshot(path=shot, full_page=True)
    finally:
        tab.close()
    return found


def pages(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        yield from sorted(path.rglob("*.html")) if path.is_dir() else [path]


def main() -> int:
    prog = "python -m docs.look"
    parser = Parser(prog=prog, description=__doc__, example=f"{prog} site demo --shots /tmp/shots")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PAGE", help="HTML files, or folders of them")
    parser.add_argument("--shots", type=Path, help="folder for pictures of the pages")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("Chromium is missing: install it (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("playwright is missing: pip install -c constraints.txt -e '.[browser]'") from error
    # 404.html asks for its style from the root of a server.
    all_pages = [page for page in pages(args.paths) if page.name != "404.html"]
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    views = [(page, width) for page in all_pages for width in WIDTHS]
    wrong = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for page, width in track(views, "look", "views"):
            name = "-".join([*page.with_suffix("").parts[-3:], str(width)])
            for sentence in look(browser, page, width, args.shots and args.shots / f"{name}.png"):
                print(f"{page} at {width} pixels: {sentence}")
                wrong += 1
        browser.close()
    print(f"{len(all_pages)} pages at {' and '.join(map(str, WIDTHS))} pixels: {wrong or 'nothing'} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_cli(main)
