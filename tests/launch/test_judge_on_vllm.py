"""A language model that a real vLLM server on this machine serves judges the responses of a ring."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tiny import WORDS, save_tiny_model
from transformers import AutoTokenizer

from r2m_async.launch.ring import Ring

pytestmark = [pytest.mark.ring, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(URL, name of the model, its tokenizer) of a vLLM server with a tiny random model."""
    directory = tmp_path_factory.mktemp("judge")
    save_tiny_model(directory / "model", "qwen2", False, WORDS, seed=7, width=128)
    (directory / "template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = (directory / "log").open("w")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory / "model")]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--chat-template", str(directory / "template.jinja"), "--max-model-len", "256", "--dtype", "float32"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    process = subprocess.Popen(command, stdout=told, stderr=told, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield f"{url}/v1", "tiny", AutoTokenizer.from_pretrained(directory / "model")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_judge_on_a_vllm_server_rates_every_response_of_a_ring(server, tiny_config):
    """A bias makes the random model reply with one digit, so that the rating is known."""
    url, model, tokenizer = server
    (seven,) = tokenizer.encode("7", add_special_tokens=False)
    body = {"logit_bias": {str(seven): 100}}
    options = {"url": url, "model": model, "max_tokens": 1, "template": "{prompt}{response}", "body": body}
    functions = {"judge": {"function": "r2m_async.rewards:judge", "weight": 2.0, "retries": 1, "options": options}}
    config = tiny_config.reward(functions=functions).run(num_steps=1)
    with Ring.of(config, in_process=True) as ring:
        metrics = ring.step()
    assert metrics["reward/judge"] == pytest.approx(0.7)
    assert metrics["reward/mean"] - metrics["reward/model_mean"] == pytest.approx(1.4, abs=1e-5)


def test_a_judge_that_the_server_does_not_have_costs_the_groups(server, tiny_config):
    url, _, _ = server
    options = {"url": url, "model": "another"}
    functions = {"judge": {"function": "r2m_async.rewards:judge", "retries": 1, "options": options}}
    with Ring.of(tiny_config.reward(functions=functions), in_process=True) as ring:
        assert ring.step()["ledger/voided/reward.judge"] == 2
