"""Headless Chromium, driven over the DevTools protocol."""

import asyncio
import base64
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_FLAGS = [
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]


class Page:
    """A tab of the browser."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result; events on the way are dropped."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": params})
        while (message := await self._socket.receive_json(timeout=30)).get("id") != self._calls:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    async def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression, which must be JSON."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{answer['exceptionDetails']} in:\n{script}")
        return answer["result"].get("value")

    async def wait_for(self, script: str, *, timeout: float = 30) -> Any:
        """Evaluate an expression until it is true, and return its value."""
        deadline = time.monotonic() + timeout
        while not (value := await self.evaluate(script)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Not true within {timeout} s: {script}")
            await asyncio.sleep(0.1)
        return value

    async def screenshot(self, path: Path) -> None:
        """Save the visible part of the page as PNG."""
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))


@asynccontextmanager
async def browse(
    url: str, profile: Path, *, width: int = 1100, height: int = 630, scale: float = 1.4
) -> AsyncIterator[Page]:
    """Open a page in a browser of its own, whose profile is empty."""
    assert EXECUTABLE is not None
    command = [EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with ClientSession() as session, asyncio.timeout(120):
            while not (announcement := profile / "DevToolsActivePort").exists() or not announcement.read_text():
                if process.poll() is not None:
                    raise RuntimeError(f"{EXECUTABLE} ended with status {process.returncode}.")
                await asyncio.sleep(0.05)
            port = announcement.read_text().split()[0]
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                target = next(tab for tab in await response.json() if tab["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
                await page.call("Emulation.setDeviceMetricsOverride", **size)
                yield page
    finally:
        process.kill()
        process.wait()
