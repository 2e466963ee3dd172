"""A language model that a real vLLM server on this machine serves judges the responses of a ring."""

import pytest
from tiny import WORDS, save_tiny_model
from transformers import AutoTokenizer
from vllm_servers import vllm_server

from r2m_async.launch.ring import Ring

pytestmark = [pytest.mark.ring, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(URL, name of the model, its tokenizer) of a vLLM server with a tiny random model."""
    directory = tmp_path_factory.mktemp("judge")
    save_tiny_model(directory / "model", "qwen2", False, WORDS, seed=7, width=128)
    (directory / "template.jinja").write_text(TEMPLATE)
    with vllm_server(directory / "model", "tiny", "--chat-template", str(directory / "template.jinja")) as url:
        yield f"{url}/v1", "tiny", AutoTokenizer.from_pretrained(directory / "model")


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
