"""The page in a real browser: a script of the test's own measures it and uses it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from picture.plans import HALVES, THIRDS, Planned, dealt, planned

from raygraft.graph.graph import Graph
from raygraft.picture import plan_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"
    ),
]

WATCH = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
</script>"""

USE = """<script>
const inside = (a, b) =>
  a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
const meet = (a, b) =>
  a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom - 1 && b.top < a.bottom - 1;

function measure(drawing) {
  const frame = drawing.getBoundingClientRect();
  const texts = [...drawing.querySelectorAll("text")];
  const places = texts.map((text) => text.getBoundingClientRect());
  const found = { boxes: 0, outside: [], overlapping: [], arrows: 0 };
  for (const box of drawing.querySelectorAll(".box")) {
    found.boxes++;
    const body = box.querySelector(".body").getBoundingClientRect();
    for (const text of box.querySelectorAll("text")) {
      if (!inside(text.getBoundingClientRect(), body)) found.outside.push(text.textContent);
    }
  }
  found.arrows = drawing.querySelectorAll(".arrow").length;
  places.forEach((place, n) => {
    if (!inside(place, frame)) found.outside.push(texts[n].textContent);
    for (let other = 0; other < n; other++) {
      if (meet(place, places[other])) {
        found.overlapping.push(`${texts[n].textContent} / ${texts[other].textContent}`);
      }
    }
  });
  return found;
}

const shown = () => [...document.querySelectorAll(".detail")]
  .filter((detail) => detail.checkVisibility()).map((detail) => detail.id);

function use() {
  const found = { steps: {} };
  const drawing = document.querySelector(".drawing");
  const boxes = drawing.querySelectorAll(".box");
  found.before = shown();
  boxes[1].dispatchEvent(new PointerEvent("pointerenter"));
  found.steps.pointed = shown();
  boxes[1].dispatchEvent(new PointerEvent("pointerleave"));
  found.steps.left = shown();
  boxes[1].dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
  boxes[0].dispatchEvent(new PointerEvent("pointerenter"));
  boxes[0].dispatchEvent(new PointerEvent("pointerleave"));
  found.steps.kept = shown();
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  found.steps.escaped = shown();
  boxes[0].focus();
  found.steps.focused = shown();
  boxes[0].dispatchEvent(
    new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true, cancelable: true }));
  found.steps.next = shown();
  document.activeElement.blur();

  found.short = measure(drawing);
  const link = document.querySelector(".unfold");
  if (link) {
    const all = document.querySelector(".all");
    found.allHidden = !all.checkVisibility();
    link.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
    found.shortHidden = !drawing.checkVisibility();
    found.focus = document.activeElement.dataset.key;
    found.all = measure(all);
  }
  // Each lane's name stands above its rail.
  const rails = [...document.querySelectorAll(".drawing:not([hidden]) .rail")]
    .filter((rail) => rail.checkVisibility()).map((rail) => rail.getBoundingClientRect());
  found.lanes = [...document.querySelectorAll(".name")].map((name, n) => {
    const place = name.getBoundingClientRect();
    return Math.abs((place.left + place.right) / 2 - (rails[n].left + rails[n].right) / 2);
  });
  found.wide = [...document.querySelectorAll(".memory dd, .memory dt")]
    .filter((item) => item.scrollWidth > item.clientWidth + 1).map((item) => item.textContent);
  found.styles = getComputedStyle(document.querySelector(".box .body")).fill;
  found.ready = document.body.dataset.ready;
  found.errors = errors;
  return found;
}
// A window that is not in focus yet tells elements nothing of theirs.
function whenInFocus() {
  if (document.hasFocus()) document.body.dataset.found = JSON.stringify(use());
  else setTimeout(whenInFocus, 1);
}
whenInFocus();
</script>"""


def read_in_browser(made: Planned, folder: Path, *flags: str) -> dict[str, Any]:
    """What the test's script finds in the page of a plan."""
    page = plan_page(made.plan, made.problem)
    page = page.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{USE}</body>")
    file = folder / "plan.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1500,1000",
        "--virtual-time-budget=100000",  # as long as the page waits for something
        *flags,
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, f"the page's script did not get through: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


CASES = {
    "2 devices": (2, HALVES, 60, 6),
    "3 devices": (3, THIRDS, 91, None),
    "8 devices": (8, None, 30, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_demo_model(demo_graph: Graph, tmp_path: Path, case: str) -> None:
    devices, rules, stages, folded = CASES[case]
    made = planned(demo_graph, devices, dealt(demo_graph) if rules is None else rules)
    found = read_in_browser(made, tmp_path)
    check(found, made, devices)
    assert found["all"]["boxes"] == stages
    assert folded is None or found["short"]["boxes"] == folded


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_eighty_blocks(eighty_blocks: Graph, tmp_path: Path, devices: int) -> None:
    rules = {2: HALVES, 3: THIRDS, 8: dealt(eighty_blocks)}[devices]
    made = planned(eighty_blocks, devices, rules)
    found = read_in_browser(made, tmp_path)
    check(found, made, devices)
    assert found["all"]["boxes"] == len(made.plan.stages)
    assert found["short"]["boxes"] < 30


def test_four_blocks_are_not_folded(four_blocks: Graph, tmp_path: Path) -> None:
    made = planned(four_blocks, 2, HALVES)
    found = read_in_browser(made, tmp_path)
    check(found, made, 2)
    assert found["short"]["boxes"] == 8
    assert "all" not in found


def test_light_and_dark_differ(four_blocks: Graph, tmp_path: Path) -> None:
    made = planned(four_blocks, 2, HALVES)
    found = [
        read_in_browser(made, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
        for scheme in (0, 1)
    ]
    assert found[0]["styles"] != found[1]["styles"]


def check(found: dict[str, Any], made: Planned, devices: int) -> None:
    """The script ran, everything is where it belongs, and boxes tell their reasons."""
    assert found["errors"] == []
    assert found["ready"] == "true"
    assert found["before"] == []
    first, second = found["steps"]["focused"], found["steps"]["pointed"]
    assert first == ["stage-0"]
    assert len(second) == 1
    steps = {"left": [], "kept": second, "escaped": [], "next": second}
    assert found["steps"] == {"pointed": second, "focused": first, **steps}
    assert found["wide"] == []
    assert len(found["lanes"]) == devices
    assert max(found["lanes"]) < 1
    for kind in {"short", "all"} & found.keys():
        assert found[kind]["outside"] == []
        assert found[kind]["overlapping"] == []
    if "all" in found:
        assert found["allHidden"]
        assert found["shortHidden"]
        assert found["focus"].startswith("stage-")
        assert found["all"]["arrows"] == made.plan.hops + 1
