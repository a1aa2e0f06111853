"""The page that runs an entry in a browser answers as PyTorch does."""

import functools
import http.server
import json
import re
import runpy
import shutil
import subprocess
import threading
from html import unescape
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = [name for name, there in (("chromium", CHROMIUM), ("npm", shutil.which("npm"))) if not there]
MISSING += [name for name in ("onnx", "onnxscript") if not find_spec(name)]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_ten_images_are_classified_as_by_pytorch(tmp_path):
    try:
        runpy.run_path(str(ROOT / "examples" / "browser.py"))["main"](tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("npm does not reach its registry")
    page = (ROOT / "docs" / "try.md").read_text(encoding="utf-8")
    (tmp_path / "index.html").write_text(page[page.index("<div") :], encoding="utf-8")
    shutil.copy(ROOT / "docs" / "try" / "try.js", tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"),
            f"http://127.0.0.1:{server.server_address[1]}/?test",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        server.shutdown()
    answers = re.search(r'<pre id="tests">(.*?)</pre>', done.stdout, re.DOTALL)
    assert answers, done.stdout[-2000:]
    found = json.loads(unescape(answers[1]))
    assert [image["class"] for image in found] == [image["expected"]["class"] for image in found] == list(range(10))
    assert [image["energy"] for image in found] == pytest.approx([image["expected"]["energy"] for image in found], 1e-4)
    assert "neurons fired" in done.stdout
