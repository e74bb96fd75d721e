"""Pages with a viewer: what they hold, and, where there is one, in a browser."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from swinsmt_jax.data import nifti
from swinsmt_jax.results import viewer
from swinsmt_jax.results.result import Result

pytest.importorskip("ipyniivue")
NAMES = {1: "spleen", 3: "<b>liver", 255: "part of my own"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module", params=["alone", "beside"])
def page(tmp_path_factory, request):
    """A page of labels, or of labels beside a truth that has a liver more."""
    labels = np.zeros((24, 20, 16), np.uint8)
    labels[4:9, 4:9, 4:9], labels[12:20, 8:16, 6:10] = 1, 3
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    volume = nifti.from_array(np.where(labels > 0, 60.0, -900.0), affine)
    path = tmp_path_factory.mktemp("view") / "scan_view.html"
    if request.param == "alone":
        viewer.write(path, Result(volume, labels, NAMES))
        return path
    found = np.where(labels == 3, 0, labels).astype(np.uint8)
    viewer.write(path, Result(volume, found, NAMES), truth=labels)
    return path


def test_a_page_holds_names_and_numbers_and_escapes_them(page):
    text = page.read_text()
    assert "spleen" in text and "&lt;b&gt;liver" in text and "<b>liver" not in text
    assert "part of my own" not in text  # not in the scan
    assert f"{125 * 12 / 1000:.1f}" in text and ">60<" in text
    assert (">truth<" in text) == (text.count('<canvas id="canvas') == 2)
    assert not re.search(
        r"<(script|link|img)[^>]+(src|href)=", text
    )  # needs no network


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_it_and_moves_to_a_structure(page):
    text = page.read_text()
    page.write_text(
        text.replace(
            "document.body.dataset.ready",
            "document.querySelector('[data-go=\"4\"]').click();\n"
            "document.querySelector('[data-id=\"2\"]').click();\n"
            "document.body.dataset.alpha = nv.volumes[1].colormapLabel.lut"
            ".filter((x, i) => i % 4 == 3);\n"
            "document.body.dataset.places = all.map(one => "
            "Array.from(one.scene.crosshairPos, x => x.toFixed(3)).join(' '));\n"
            "document.body.dataset.ready",
        )
    )
    options = "--headless --no-sandbox --disable-quic --no-first-run --disable-sync"
    options += " --disable-background-networking --disable-component-update"
    options += " --use-angle=swiftshader --enable-unsafe-swiftshader"
    options += " --ignore-gpu-blocklist --enable-logging=stderr --dump-dom"
    options += f" --virtual-time-budget=20000 --user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *options.split(), page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in said if not re.search("niivue-(info|warn)", line)]
    assert 'data-ready="2"' in found.stdout
    assert 'data-alpha="0,0,0,0,255"' in found.stdout  # the spleen was switched off
    places = re.search('data-places="([^"]*)', found.stdout)[1].split(",")
    assert len(places) == text.count('<canvas id="canvas') and len({*places}) == 1
    place = re.search(r'<span id="place">([^<]*)', found.stdout)[1]
    assert place.startswith("3")  # mm; 31 or so to the right
    assert ("liver" in place) == (len(places) == 1)  # which the prediction lacks
