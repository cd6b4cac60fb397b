"""Uploads: what the real client sends to a Hub on this machine, and what never leaves."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from models import CONFIGS, random_model

import bilinear_lens as bl
from bilinear_lens.models.hub import push_to_hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model with a card, and much that is none of the Hub's business."""
    folder = tmp_path / "model"
    random_model(CONFIGS["llama"]).save_pretrained(folder)
    (folder / "README.md").write_text("Made by a test, at no cost.")
    (folder / ".env").write_text("SECRET=1")
    (folder / "runs").mkdir()
    (folder / "runs" / "trainer_state.json").write_text("{}")
    return folder


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; `uploaded` has what it was given."""

    private = True
    refusal = 200
    asked: list[str]
    uploaded: dict[str, bytes]

    def _answer(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(self.refusal)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(f"GET {self.path}")
        self._answer({"id": "somebody/model", "private": self.private})

    def do_POST(self) -> None:
        self.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        url = f"http://{self.headers['Host']}/somebody/model"
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.uploaded[line["value"]["path"]] = content
            return self._answer({"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self._answer({"url": url, "id": "somebody/model"})

    def log_message(self, format: str, *args) -> None:
        """Nothing on the terminal."""


@contextmanager
def hub(monkeypatch, **traits) -> Iterator[type[Hub]]:
    """The real client speaks to a server on this machine."""
    handler = type("Handler", (Hub,), {"asked": [], "uploaded": {}, **traits})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


def test_the_client_uploads_a_model_and_nothing_else(folder, monkeypatch):
    with hub(monkeypatch) as server:
        url = push_to_hub(folder, "somebody/model", private=True, token="hf_none")
    assert url.startswith("http://127.0.0.1") and url.endswith("/somebody/model")
    assert "POST /api/repos/create" in server.asked
    assert server.uploaded.keys() >= {"config.json", "model.safetensors", "README.md"}
    for name, content in server.uploaded.items():
        assert "/" not in name and not name.startswith(".")
        assert content == (folder / name).read_bytes()


def test_a_branch_is_made_and_named(folder, monkeypatch):
    with hub(monkeypatch) as server:
        url = push_to_hub(folder, "somebody/model", revision="second", token="hf_none")
    assert url.endswith("/somebody/model/tree/second")
    assert any("/branch/second" in asked for asked in server.asked)
    assert any("/commit/second" in asked for asked in server.asked)


def test_private_weights_never_reach_a_public_repository(folder, monkeypatch):
    with (
        hub(monkeypatch, private=False) as server,
        pytest.raises(ValueError, match="there already, and public"),
    ):
        push_to_hub(folder, "somebody/model", private=True, token="hf_none")
    assert not server.uploaded


def test_faults_of_the_network_are_one_error(folder, monkeypatch):
    with (
        hub(monkeypatch, refusal=403) as server,
        pytest.raises(ValueError, match=r"Cannot push to 'somebody/model'.*403.*hf auth login"),
    ):
        push_to_hub(folder, "somebody/model", token="hf_none")
    assert not server.uploaded
    with pytest.raises(ValueError, match="Cannot push"):  # the server is gone
        push_to_hub(folder, "somebody/model", token="hf_none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Cannot push"):
        push_to_hub(folder, "somebody/model", token="hf_none")


def test_what_should_not_be_on_the_hub_is_refused_before_the_network(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a client was made")

    monkeypatch.setattr("bilinear_lens.models.hub.HfApi", refuse)

    def fault(repo_id: str = "somebody/model") -> str:
        with pytest.raises(ValueError) as caught:
            push_to_hub(folder, repo_id)
        return str(caught.value)

    assert "user/name" in fault("model") and "user/name" in fault("a/b/c")
    assert "'some body/model'" in fault("some body/model")
    (folder / "optimizer.pt").write_bytes(b"")
    assert "pickles (optimizer.pt)" in fault()
    (folder / "optimizer.pt").unlink()
    (folder / "README.md").write_text(" \n")
    assert "no model card" in fault() and "what it cost" in fault()
    (folder / "README.md").unlink()
    assert "no model card" in fault()
    weights = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": weights.name, "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    assert "lacks ['model-00002-of-00002.safetensors']" in fault()
    index.unlink()
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "cut short" in fault()
    weights.rename(folder / "pytorch_model.bin")
    assert "only pickles (pytorch_model.bin)" in fault()
    (folder / "config.json").unlink()
    assert "no config.json" in fault()
    with pytest.raises(ValueError, match="There is no folder"):
        push_to_hub(folder / "absent", "somebody/model")


def test_a_classifier_is_pushed_with_its_card(tmp_path, monkeypatch):
    classifier = bl.HookedBilinearClassifier.from_config(input_shape=(5,), n_classes=3, d_model=4)
    classifier.save_pretrained(tmp_path / "toy", card="Random weights.")
    with hub(monkeypatch) as server:
        push_to_hub(tmp_path / "toy", "somebody/model", token="hf_none")
    assert server.uploaded.keys() == {"config.json", "model.safetensors", "README.md"}
