"""Functions of the user's that raise or return what is no number are told as theirs, whatever stage they run in."""

import math
import re
import sys
from pathlib import Path

import pytest

import r2m_async
from r2m_async import reference
from r2m_async.advantages import register_advantage
from r2m_async.cli import main
from r2m_async.errors import ConfigError, FunctionFailed, NonFiniteStep
from r2m_async.evaluation.judging import judge
from r2m_async.launch.ring import Ring
from r2m_async.plugins import as_number, called, called_for_number, named_function

pytestmark = pytest.mark.models

FAILURES = {
    "ValueError: my verifier broke": "ValueError('my verifier broke')",
    "TimeoutError: the sandbox took too long": "TimeoutError('the sandbox took too long')",
    "RuntimeError: CUDA out of memory": "RuntimeError('CUDA out of memory')",
    "MemoryError": "MemoryError()",
    "SystemExit: 3": "SystemExit(3)",
    "mine.Own: two": "Own('one', 'two')",
}
MODULE = """
import math
import numpy, torch

class Own(BaseException):
    def __init__(self, first, second):  # which no pickle could make anew
        super().__init__(second)

def raises():
    raise FAILURE

def reward(prompt, response):
    return raises()

def gold(prompt, response, finished):
    return raises()

def advantage(inputs):
    return raises()

def loss(inputs):
    return raises()

def of_wrong_shape(inputs):
    return inputs.ratio.sum()

def not_a_number(inputs):
    return inputs.ratio * math.nan

class Made:
    def __init__(self, **options):
        raises()

class Called:
    def __call__(self, inputs):
        return raises()

def returns(prompt, response, finished=True):
    return VALUE

def second_response_only(prompt, response):
    return 0.0 if next(COUNT) % 3 else float("nan")

import itertools
COUNT = itertools.count(2)

def too_few(prompt):
    return 1.0
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes the module `mine`, with this failure and this value."""

    def write(failure: str = "ValueError()", value: str = "0.0", text: str = MODULE) -> None:
        (tmp_path / "mine.py").write_text(text.replace("FAILURE", failure).replace("VALUE", value), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.delitem(sys.modules, "mine", raising=False)

    return write


MEMBERS = {
    "reward.functions 'mine:reward'": {"reward": {"functions": ["mine:reward"]}},
    "evaluation.gold 'mine:gold'": {"evaluation": {"gold": "mine:gold"}},
    "advantage.name 'mine:advantage'": {"advantage": {"name": "mine:advantage"}},
    "advantage.name 'mine:Made'": {"advantage": {"name": "mine:Made"}},
    "advantage.name 'mine:Called'": {"advantage": {"name": "mine:Called"}},
}


def failure_of(config) -> str:
    """What ends the ring's first step, and the reference's."""
    with Ring.of(config, in_process=True) as ring, pytest.raises(FunctionFailed) as caught:
        ring.step()
    if config.evaluation.gold is None:
        with pytest.raises(FunctionFailed) as of_reference:
            reference.train(config)
        assert str(of_reference.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(
    ("failure", "on_nonfinite"), [*((failure, "stop") for failure in FAILURES), (next(iter(FAILURES)), "skip")]
)
def test_what_a_function_raises_is_told_with_step_response_and_its_own_traceback(
    tiny_config, own_module, member, failure, on_nonfinite
):
    own_module(FAILURES[failure])
    tree = tiny_config.learner(on_nonfinite=on_nonfinite).to_dict()
    for section, keys in MEMBERS[member].items():
        tree[section] |= keys
    told = failure_of(type(tiny_config).from_dict(tree))
    first, *frames = told.splitlines()
    if member.startswith("advantage"):
        assert first == f"step 0 (groups [0, 1]): {member} raised {failure}"
    else:
        place = r"step 0, group 0 \(prompt 'prompts.jsonl:\d+'\), response 0: "
        assert re.fullmatch(place + re.escape(f"{member} raised {failure}"), first)
    assert frames[-1] == failure and frames[-2].strip() == f"raise {FAILURES[failure]}"
    files = re.findall(r'File "([^"]+)"', told)
    assert len(files) >= 2 and all(file.endswith("mine.py") for file in files), "only the user's own frames"


@pytest.mark.parametrize("failure", ["ValueError: my verifier broke", "SystemExit: 3"])
def test_what_a_loss_raises_is_told_with_step_and_its_own_traceback(tiny_config, own_module, failure):
    own_module(FAILURES[failure])
    first, *frames = failure_of(tiny_config.objective(loss="mine:loss")).splitlines()
    assert first == f"step 0 (groups [0, 1]): objective.loss 'mine:loss' raised {failure}"
    assert frames[-1] == failure and frames[-2].strip() == f"raise {FAILURES[failure]}"


def test_a_loss_that_returns_something_else_or_no_number_is_told_with_its_step(tiny_config, own_module):
    own_module()
    told = failure_of(tiny_config.objective(loss="mine:of_wrong_shape"))
    assert told.startswith(
        "step 0 (groups [0, 1]): objective.loss mine:of_wrong_shape must return losses in the shape of"
    )
    config = tiny_config.objective(loss="mine:not_a_number").run(num_steps=1)
    with pytest.raises(
        NonFiniteStep, match=r"^step 0 \(groups \[0, 1\]\): objective.loss 'mine:not_a_number' gave nan"
    ):
        reference.train(config)
    with Ring.of(config.learner(on_nonfinite="skip"), in_process=True) as ring:
        assert ring.step()["policy/skipped_updates"] == 2


def test_a_loss_without_a_finite_gradient_is_named(tiny_config, own_module):
    own_module(text="def root(inputs):\n    return (inputs.ratio - 1).abs().sqrt()\n")
    told = r"^step 0 \(groups \[0, 1\]\): the gradient norm, of objective.loss 'mine:root', is nan"
    with (
        Ring.of(tiny_config.objective(loss="mine:root"), in_process=True) as ring,
        pytest.raises(NonFiniteStep, match=told),
    ):
        ring.step()


VALUES = {
    "None": "None (NoneType), which is no number",
    "'1.5'": "'1.5' (str), which is no number",
    "b'1'": "b'1' (bytes), which is no number",
    "numpy.array('1.5')": "array('1.5', dtype='<U3') (ndarray), which is no number",
    "[1.0]": "[1.0] (list), which is no number",
    "1j": "1j (complex), which is no number",
    "torch.zeros(2)": "tensor([0., 0.]) (Tensor), which is no number",
    "10 ** 400": f"1{17 * '0'}...{19 * '0'} (int), which is no number",
    "float('nan')": "nan (float), which is not finite",
    "-math.inf": "-inf (float), which is not finite",
    "torch.tensor(math.nan)": "tensor(nan) (Tensor), which is not finite",
    "1e308": "1e+308 (float), which is infinite in float32",
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["reward.functions", "evaluation.gold"])
def test_what_is_no_finite_number_is_refused_by_its_value(tiny_config, own_module, key, value):
    own_module(value=value)
    config = tiny_config.reward(functions=["mine:returns"])
    if key == "evaluation.gold":
        config = tiny_config.evaluation(gold="mine:returns")
    told = failure_of(config)
    assert told.endswith(
        f"response 0: {key} 'mine:returns' returned {VALUES[value]}; it must return one finite number for every response"
    )


def test_every_response_is_asked_for_and_named(tiny_config, own_module):
    own_module()
    named = pytest.raises(FunctionFailed, match=r"^step 0, group 0 \(prompt 'prompts.jsonl:\d+'\), response 1: ")
    with Ring.of(tiny_config.reward(functions=["mine:second_response_only"]), in_process=True) as ring, named:
        ring.step()


def test_a_function_of_too_few_arguments_says_so(tiny_config, own_module):
    own_module()
    told = failure_of(tiny_config.reward(functions=["mine:too_few"]))
    assert told.endswith("raised TypeError: too_few() takes 1 positional argument but 2 were given")


def test_numbers_of_every_kind_are_numbers():
    import decimal
    import fractions

    import numpy
    import torch

    for value in (
        2,
        2.0,
        fractions.Fraction(4, 2),
        decimal.Decimal("2.0"),
        numpy.float32(2),
        numpy.int64(2),
        numpy.array([2.0]),
        numpy.array(2),
        torch.tensor(2.0, requires_grad=True),
        torch.tensor([[2]]),
    ):
        number = as_number(value)
        assert type(number) is float and number == 2.0, value
    assert (as_number(True), as_number(False), as_number(numpy.True_)) == (1.0, 0.0, 1.0)


def test_a_value_whose_own_methods_raise_is_no_number():
    class Broken:
        def item(self):
            raise KeyError

        def __repr__(self):
            raise ValueError

    with pytest.raises(
        FunctionFailed, match=r"^here: key 'f' returned <Broken instance at .*\(Broken\), which is no number"
    ):
        called_for_number(Broken, (), "key", "f", "here")


def test_control_c_passes_through_a_users_function():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        called(interrupted, (), "key", "f", "here")


@pytest.mark.parametrize("text", ["raise SystemExit(2)", "1 / 0", "def f(:", "import sys; sys.exit('no')"])
def test_a_module_that_fails_as_it_is_imported_is_named_with_its_own_traceback(own_module, text):
    own_module(text=text)
    with pytest.raises(
        ConfigError, match=r"^reward\.functions = 'mine:f': cannot import module 'mine' to find 'f'"
    ) as caught:
        named_function("mine:f", "reward.functions")
    package = str(Path(r2m_async.__file__).parent)
    first, *more = re.findall(r'File "([^"]+)"', str(caught.value))
    # Not all of them: a library that was imported before may stand in the place of what the module calls, such as sys.exit.
    assert first.endswith("mine.py") and not any(file.startswith(package) for file in more)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_judge_that_raises_anything_is_told_with_the_answer_and_its_own_traceback(tmp_path, own_module, failure):
    own_module(FAILURES[failure])
    (tmp_path / "answers.jsonl").write_text('{"prompt": "one", "response": "a"}\n')
    named = rf"^--judge mine:gold: cannot judge the answer to 'one' \(.*, line 1\): {re.escape(failure)}; correct"
    with pytest.raises(ConfigError, match=named) as caught:
        judge(tmp_path / "answers.jsonl", "mine:gold")
    assert all(file.endswith("mine.py") for file in re.findall(r'File "([^"]+)"', str(caught.value)))


@pytest.mark.parametrize("value", ["None", "'1.5'", "torch.zeros(2)"])
def test_a_judge_that_returns_no_number_is_told_with_the_answer(tmp_path, own_module, value):
    own_module(value=value)
    (tmp_path / "answers.jsonl").write_text('{"prompt": "one", "response": "a"}\n')
    with pytest.raises(
        ConfigError, match=r"its reward for the answer to 'one' \(.*, line 1\) is .*, which is no number"
    ):
        judge(tmp_path / "answers.jsonl", "mine:returns")


@pytest.mark.parametrize(("value", "said"), [("None", "returned None"), ("math.nan", "returned nan")])
def test_the_command_line_names_function_prompt_and_last_checkpoint(
    tiny_config, tmp_path, own_module, monkeypatch, capsys, value, said
):
    """The third step's third response: one line, exit code 1, a checkpoint before it. It may fail while the second step's is
    about to be written: that one is then missing."""
    own_module(
        text=f"import itertools, math\ncount = itertools.count()\ndef f(p, r):\n    return {value} if next(count) == 14 else 1"
    )
    config = tiny_config.run(output_dir=str(tmp_path / "runs")).checkpoint(every=1).logging(live=False)
    (tmp_path / "config.yaml").write_text(config.reward(functions=["mine:f"]).to_yaml())
    assert main(["train", str(tmp_path / "config.yaml"), "--in-process"]) == 1
    told, _, checkpoint = capsys.readouterr().err.splitlines()
    assert told.startswith("r2m: the run ended: step 2, group 4 (prompt 'prompts.jsonl:")
    assert f"response 2: reward.functions 'mine:f' {said} (" in told
    assert re.fullmatch(r"The last whole checkpoint is .*step-0*[12]: `r2m resume .*` goes on from it\.", checkpoint)


# Estimators


def test_an_advantage_that_is_not_finite_is_named_with_its_response_and_is_no_users_mistake(tiny_config, own_module):
    own_module(text="def est(inputs):\n    made = inputs.rewards * 1\n    made[1, 2] = float('nan')\n    return made")
    config = tiny_config.advantage(name="mine:est")
    named = (
        r"^step 0, group 1 \(.*\), response 2: advantage mine:est must be finite on response tokens, got nan at \[1, 2\] "
        r"and 1 such values of 6; all that it was given is finite$"
    )
    with Ring.of(config, in_process=True) as ring, pytest.raises(NonFiniteStep, match=named):
        ring.step()
    with pytest.raises(NonFiniteStep, match=named):
        reference.train(config)


@register_advantage("takes_too_long")
def takes_too_long(inputs):
    raise TimeoutError("the user's own")


@pytest.mark.ring
@pytest.mark.usefixtures("ray_session")
def test_over_ray_too_a_timeout_of_the_users_is_his_and_no_hanging_stage(tiny_config):
    """The error crosses from the stage's process with its message, and without Ray's frames."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    config = tiny_config.advantage(name="takes_too_long").checkpoint(at_end=False)
    with Ring.of(config) as ring, pytest.raises(FunctionFailed) as caught:
        ring.step()
    first, *frames = str(caught.value).splitlines()
    assert first == ("step 0 (groups [0, 1]): advantage.name 'takes_too_long' raised TimeoutError: the user's own")
    assert frames[-1] == "TimeoutError: the user's own" and not any("ray" in line for line in frames)
    assert math.isfinite(ring.config.scheduling.stall_after)


# What only a terminal raises, and what only a program should do


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward": {"functions": ["mine:reward"]}}, r"reward\.functions 'mine:reward' raised KeyboardInterrupt"),
        ({"advantage": {"name": "mine:advantage"}}, r"advantage\.name 'mine:advantage' raised KeyboardInterrupt"),
        ({"evaluation": {"gold": "mine:gold"}}, r"evaluation\.gold 'mine:gold' raised KeyboardInterrupt"),
    ],
)
def test_a_keyboard_interrupt_that_no_terminal_sent_is_the_functions_own(tiny_config, own_module, changes, told):
    """It once ended the controller's thread, and the driver waited for that thread for half an hour."""
    own_module(failure="KeyboardInterrupt()")
    config = type(tiny_config).from_dict(
        {name: {**section, **changes.get(name, {})} for name, section in tiny_config.to_dict().items()}
    )
    with Ring.of(config, in_process=True) as ring, pytest.raises(FunctionFailed, match=f"step 0.*{told}"):
        ring.step()


def test_in_the_main_thread_a_keyboard_interrupt_is_the_terminals():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        called(interrupted, (), "key", "name", "here")


@pytest.mark.parametrize("error", ["SystemExit(3)", "KeyboardInterrupt()"])
def test_a_value_that_ends_a_program_when_it_is_read_is_no_number(tiny_config, own_module, error):
    own_module(
        text=f"class Value:\n    def __float__(self):\n        raise {error}\n\ndef reward(prompt, response):\n    return Value()"
    )
    config = tiny_config.reward(functions=["mine:reward"])
    with Ring.of(config, in_process=True) as ring, pytest.raises(FunctionFailed, match="which is no number"):
        ring.step()


FORKS = """
import os, sys

def end():
    ENDS

def reward(prompt, response):
    pid = os.fork()
    if pid == 0:
        end()
        return 0.0  # a child that forgot to leave
    return float(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize(
    ("ends", "status"),
    [("sys.exit(3)", 3.0), ("raise ValueError('in the child')", 1.0), ("pass", 0.0), ("os._exit(5)", 5.0)],
)
def test_a_child_that_a_function_forks_ends_with_the_function(tiny_config, own_module, ends, status):
    """It once went on as a second ring, and the function waited for it."""
    own_module(text=FORKS.replace("ENDS", ends))
    config = tiny_config.reward(functions=["mine:reward"]).head(variant="vanilla").run(num_steps=1)
    plain = tiny_config.head(variant="vanilla").run(num_steps=1)
    with Ring.of(config, in_process=True) as ring, Ring.of(plain, in_process=True) as without:
        assert ring.step()["reward/mean"] == pytest.approx(without.step()["reward/mean"] + status, abs=1e-5)


def test_an_advantage_beyond_float32_is_named_with_its_response(tiny_config, own_module):
    own_module(text="def est(inputs):\n    return inputs.rewards.double() * 0 + 1e39")
    config = tiny_config.advantage(name="mine:est")
    with (
        Ring.of(config, in_process=True) as ring,
        pytest.raises(NonFiniteStep, match=r"response 0: advantage mine:est"),
    ):
        ring.step()
