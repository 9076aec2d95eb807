"""docs/quickstart.md, done as it says, with the real parts. Only the ports are others."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import Process

TEXT = (Path(__file__).parent.parent / "docs" / "quickstart.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    """The first fenced block of a kind."""
    found = re.search(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.timeout(180)
def test_the_quickstart(
    run: Callable[..., Process], free_port: Callable[[], int], tmp_path: Path
) -> None:
    chain = run("farebox", "devnet", "--port", "0", "--json")
    net = json.loads(chain.wait_for(r"^\{.*\}$").group(0))
    (tmp_path / "devnet.json").write_text(json.dumps(net))
    (tmp_path / "settler.key").write_text(net["settler"]["private_key"])
    (tmp_path / "README.md").write_text("something to sell")

    api, gateway = free_port(), free_port()
    sold = run("python", "-m", "http.server", str(api), "--bind", "127.0.0.1")
    sold.wait_port(api)
    served = run(
        *("farebox", "serve", "--listen", f"127.0.0.1:{gateway}"),
        *("--upstream", f"http://127.0.0.1:{api}", "--price", "$0.002"),
        *("--network", "base-sepolia", "--rpc", net["rpc_url"]),
        *("--pay-to", "0x1111111111111111111111111111111111111111"),
    )
    served.wait_port(gateway)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{gateway}/README.md", timeout=10)
    assert refused.value.code == 402
    refused.value.close()

    (tmp_path / "agent.py").write_text(block("python").replace(":8402", f":{gateway}"))
    agent = run("python", "agent.py")
    assert agent.wait_end() == 0, agent.text
    assert agent.text == block("text")
