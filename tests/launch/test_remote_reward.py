"""A reward model that a real vLLM server holds gives the numbers of the same model here."""

import asyncio
import json
import shutil
import socket

import pytest
from tiny import WORDS, save_tiny_model
from vllm_servers import vllm_server

from r2m_async.errors import FunctionFailed
from r2m_async.launch.ring import Ring
from r2m_async.reward_models.ensemble import RewardEnsemble
from r2m_async.rewards import remote_reward

pytestmark = [pytest.mark.ring, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }}"
    "{% if not (loop.last and continue_final_message) %}</s>{% endif %}{% endfor %}"
)
TURNS = [("system", "be warm"), ("user", "the old river :")]
LONG = " ".join(WORDS * 20)


def tokenizer_of(directory, **changes):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model with a chat template of its own. vLLM has no heads below 32 numbers."""
    directory = tmp_path_factory.mktemp("remote") / "model"
    save_tiny_model(directory, "llama", True, WORDS[::2], seed=1, width=64)
    tokenizer_of(directory, chat_template=TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def url(model):
    with vllm_server(model, "tiny") as url:
        yield url


def asked(url, directory, prompt, response, finished, **options):
    """What the function is given for raw text, and for turns that a policy's template has rendered."""
    raw = isinstance(prompt, str)
    messages = [{"role": role, "content": text} for role, text in ([("user", prompt)] if raw else prompt)]
    text = prompt if raw else "".join(f"<{role}>{said}" for role, said in prompt)
    options = {"url": url, "reward_model": str(directory), "model": "tiny"} | options
    return asyncio.run(remote_reward(text, messages, response, finished, **options))


@pytest.mark.parametrize("endpoint", ["classify", "pooling"])
@pytest.mark.parametrize("finished", [True, False])
def test_its_number_is_that_of_the_local_model(url, model, endpoint, finished):
    local = RewardEnsemble(model)
    for prompt in ("the river :", TURNS, LONG):
        expected = local.score(prompt, [" warm and old"], finished).item()
        assert asked(url, model, prompt, " warm and old", finished, endpoint=endpoint) == pytest.approx(
            expected, abs=1e-4
        )


@pytest.mark.parametrize("change", ["no template", "the end of text pads"])
def test_it_reads_a_text_as_the_local_model_does(url, model, tmp_path, change):
    """The weights are those on the server, which is given tokens."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    if change == "no template":
        tokenizer_of(other, chat_template=None)
        (other / "chat_template.jinja").unlink(missing_ok=True)
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
        tokenizer_of(other, pad_token="</s>")
    for finished in (True, False):
        expected = RewardEnsemble(other).score(TURNS, [" cold"], finished).item()
        assert asked(url, other, TURNS, " cold", finished) == pytest.approx(expected, abs=1e-4)
        assert (
            asked(url, model, TURNS, " cold", finished) != pytest.approx(expected, abs=1e-4) or change != "no template"
        )


def test_a_ring_is_given_the_same_reward_twice(url, model, tiny_config):
    options = {"url": url, "model": "tiny", "reward_model": str(model)}
    functions = {"remote": {"function": "r2m_async.rewards:remote_reward", "options": options}}
    config = tiny_config.head(variant="vanilla").reward(model=str(model), functions=functions)
    with Ring.of(config, in_process=True) as ring:
        metrics = ring.step()
    assert metrics["reward/remote"] == pytest.approx(metrics["reward/model_mean"], abs=1e-4)


def test_what_the_server_refuses_is_a_failure_with_its_words(url, model, tiny_config):
    with pytest.raises(ValueError, match="status 404.*does not exist"):
        asked(url, model, "the river :", " warm", True, model="another")
    with pytest.raises(ValueError, match="status 400.*maximum context length is 256"):
        asked(url, model, LONG, " warm", True, max_tokens=300)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="classify cannot be reached: ConnectError.*is the server up"):
        asked(nobody, model, "the river :", " warm", True)
    options = {"url": nobody, "reward_model": str(model)}
    functions = {"remote": {"function": "r2m_async.rewards:remote_reward", "options": options}}
    with (
        Ring.of(tiny_config.reward(functions=functions), in_process=True) as ring,
        pytest.raises(FunctionFailed, match=r"(?s)reward.functions.remote.*cannot be reached"),
    ):
        ring.step()
    functions["remote"]["retries"] = 1
    with Ring.of(tiny_config.reward(functions=functions), in_process=True) as ring:
        assert ring.step()["ledger/voided/reward.remote"] == 2
