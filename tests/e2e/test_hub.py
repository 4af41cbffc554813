"""A model by its hub id, fetched from a hub on this machine: the part of the hub's protocol that a download needs."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_folder):
    """Serves `someone/tiny` and counts the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            path = self.path.split("?")[0]
            files = [file for file in sorted(tiny_folder.iterdir()) if file.is_file()]
            if path.startswith("/api/models/someone/tiny/tree/"):
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                self.answer(json.dumps(tree).encode())
                return
            if path.startswith("/api/models/someone/tiny"):
                siblings = [{"rfilename": file.name} for file in files]
                self.answer(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode())
                return
            file = tiny_folder / path.rsplit("/", 1)[-1]
            if path.startswith("/someone/tiny/resolve/") and file.is_file():
                self.answer(file.read_bytes())
                return
            self.answer(b"", 404)

        do_HEAD = do_GET

        def answer(self, body, code=200):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def generate(model, tmp_path, **environment):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    flags = ["--dataset_name", str(prompts), "--output_file", str(tmp_path / "out.jsonl"), "--max_new_tokens", "2"]
    return subprocess.run(
        [sys.executable, "-m", "jaxpost", "generate", "--model_name_or_path", model, *flags],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_a_hub_id_is_downloaded_once_and_then_works_offline(hub, tmp_path):
    endpoint, requests = hub
    done = generate("someone/tiny", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["completion_ids"]) == 2
    seen = len(requests)
    assert any("model.safetensors" in path for path in requests)
    assert generate("someone/tiny", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1").returncode == 0
    assert len(requests) == seen


def test_an_unknown_id_is_one_line_and_exit_2(hub, tmp_path):
    done = generate("someone/else", tmp_path, HF_ENDPOINT=hub[0], HF_HUB_OFFLINE="0")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("jaxpost: model 'someone/else' is not a local folder and could not be fetched from the hub")
    assert "Traceback" not in done.stderr
