"""TensorBoard in a real browser: every tab that a run with tiles fills is filled, and shows it.

Needs Debian's chromium and playwright's Python package, which brings no browser of its own here. ``LRTT_SCREENSHOTS=DIR``
keeps the screenshots.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clean_environment
from lightning_helpers import Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor
from PIL import Image

from lightning_lrtt import LRTTConfig, presets

_CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on PATH: apt-get install -y chromium"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="no playwright: pip install playwright"),
]
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]  # containers: root, no GPU, a small /dev/shm
_WAIT = 60_000  # ms; a busy machine


class Validated(Net):
    """Gives HPARAMS a metric."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs that differ in the rank."""
    folder = tmp_path_factory.mktemp("logs")
    ecram = presets.device("ecram")
    for rank in (1, 2):
        torch.manual_seed(0)
        config = LRTTConfig(rank=rank, transfer_every=4, reinit_gain=1.0, fast_device=ecram, visible_device=ecram)
        monitor = TileMonitor(gradient_every_n_steps=5, images_every_n_epochs=1)
        trainer(folder / f"rank{rank}", [monitor], config, max_epochs=3).fit(Validated(), loader(), loader(2))
    return folder


@pytest.fixture(scope="module")
def address(logs: Path) -> Iterator[str]:
    """Where TensorBoard serves these runs."""
    words = ["--logdir", str(logs), "--host", "127.0.0.1", "--port", "0", "--load_fast=false"]
    words += ["--reload_task", "blocking", "--reload_interval", "0"]  # all is read before the address is said
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )
    try:
        assert server.stdout is not None
        said = ""
        for line in server.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found.group()
                break
        else:
            pytest.fail(f"TensorBoard ended: {said}")
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """A browser window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=_CHROMIUM, args=_FLAGS, timeout=2 * _WAIT)
        window = browser.new_page(viewport={"width": 1400, "height": 900})
        window.set_default_timeout(_WAIT)
        yield window
        browser.close()


def soon(look: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
    """What `look` finds as soon as it is enough, or else what it found last."""
    end = time.monotonic() + _WAIT / 1000
    while not enough(found := look()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def picture(page: Any, name: str) -> np.ndarray:
    """A screenshot as pixels; it must show more than a frame."""
    raw = page.screenshot()
    if folder := os.environ.get("LRTT_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(raw)
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def assert_filled(page: Any, name: str, *words: str) -> None:
    """The words are visible, nothing says that there is no data, and the picture is not blank."""
    for word in words:
        page.get_by_text(word).first.wait_for(state="visible")
    for nothing in ("No dashboards are active", "No scalar data was found", "was not found", "No runs are selected"):
        assert page.get_by_text(nothing).locator("visible=true").count() == 0, nothing

    def look() -> tuple[float, int]:
        """The share of pixels that are not background, and the number of colours."""
        time.sleep(1.0)  # charts draw after their data has come
        pixels = picture(page, name)[150:, 400:].reshape(-1, 3)  # without the bar at the top and the runs at the left
        drawn = np.abs(pixels.astype(int) - np.median(pixels, axis=0)).sum(-1) > 30
        return float(drawn.mean()), len(np.unique(pixels, axis=0))

    drawn, colours = soon(look, lambda found: found[0] > 0.005 and found[1] > 20)
    assert drawn > 0.005, (name, drawn)
    assert colours > 20, name


def show(page: Any, address: str, tab: str) -> None:
    """Open a tab afresh; TensorBoard reads the fragment when it starts."""
    page.goto("about:blank")
    page.goto(f"{address}/#{tab}")


def test_time_series(page: Any, address: str) -> None:
    show(page, address, "timeseries")
    page.locator("input[placeholder='Filter tags (regex)']").fill("tile/net.0/(norm|effective)")
    page.keyboard.press("Escape")  # the list of suggestions
    assert_filled(page, "time_series", "tile/net.0/norm_AB", "tile/net.0/effective_rank_AB")


def test_scalars(page: Any, address: str) -> None:
    show(page, address, "scalars")
    assert_filled(page, "scalars", "cost/energy_pJ", "hp")


def test_custom_scalars(page: Any, address: str) -> None:
    show(page, address, "custom_scalars")
    charts = ("stability: above 2 / curvature a step diverges", "effective rank of A·B", "energy, pJ")
    assert_filled(page, "custom_scalars", "tiles: overall", *charts)
    page.get_by_text("Matches (4)").first.wait_for(state="visible")  # two runs, two tiles
    band = page.get_by_text("C: mean between its extremes").first
    band.scroll_into_view_if_needed()
    band.wait_for(state="visible")
    assert_filled(page, "custom_scalars_tile", "C: mean between its extremes")


def test_images(page: Any, address: str) -> None:
    show(page, address, "images")
    assert_filled(page, "images", "image/net.0/AB", "image/net.0/C")

    def large(widths: list[int]) -> bool:
        return sum(width >= 100 for width in widths) >= 4

    images = page.locator("img")  # looks into shadow roots, where they are
    widths = soon(lambda: images.evaluate_all("all => all.map(image => image.naturalWidth)"), large)
    assert large(widths), widths


def test_histograms(page: Any, address: str) -> None:
    show(page, address, "histograms")
    assert_filled(page, "histograms", "histogram/net.0/A", "histogram/net.0/C")


def test_text(page: Any, address: str) -> None:
    show(page, address, "text")
    assert_filled(page, "text", "info/build/text_summary", "cpu_instructions")
    assert page.locator("table").count() >= 1  # Markdown was understood
    page.get_by_text("info/devices/text_summary").first.scroll_into_view_if_needed()
    page.get_by_text("LinearStep").first.wait_for(state="visible")


def test_hparams(page: Any, address: str) -> None:
    """The knobs that one sweeps come first, with the result beside them."""
    show(page, address, "hparams")
    for word in ("lrtt/rank", "lrtt/transfer_every", "lrtt/fast_device", "hp/val_loss"):
        page.get_by_text(word, exact=True).locator("visible=true").first.wait_for()
    assert_filled(page, "hparams", "TABLE VIEW")
    for word in ("rank1/run/version_0", "rank2/run/version_0", "ecram"):
        page.get_by_text(word).first.wait_for(state="visible")
