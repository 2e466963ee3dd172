"""Standard output that nobody reads any more, that cannot be written, or that was closed before the command began."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PLAN = ["plan", str(Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"), "run.num_steps=2"]
ENTRY = "from r2m_async.cli import entry; entry()"


def run(arguments, code=ENTRY, stdout=subprocess.PIPE, closed=()):
    """(status, standard error) of a command."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        preexec_fn=lambda: [os.close(number) for number in closed],
    )
    return done.returncode, done.stderr


def pipe_that_nobody_reads() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("arguments", [PLAN, [*PLAN, "--json"], ["config", "--schema"]])
def test_a_command_whose_reader_has_left_ends_as_sigpipe_would_end_it_without_a_traceback(arguments):
    status, said = run(arguments, stdout=pipe_that_nobody_reads())
    assert status == 141 and "Traceback" not in said and ("--json" in arguments or not said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [PLAN, [*PLAN, "--json"]])
def test_a_result_that_the_disk_does_not_take_is_no_success(arguments):
    with open("/dev/full", "w") as full:
        status, said = run(arguments, stdout=full)
    assert status == 1 and "Traceback" not in said
    assert said.splitlines()[-1] == "r2m: standard output: cannot be written: No space left on device"


def test_a_run_goes_on_when_nobody_reads_its_lines_any_more(tmp_path):
    code = """
        import sys
        from r2m_async.config import R2MConfig
        from r2m_async.runs.live import LiveTable

        with LiveTable(R2MConfig()) as live:
            for step in range(3):
                live.update({"step": float(step)}, ())
        open(sys.argv[1], "w").write("ended")
    """
    ended = tmp_path / "ended"
    status, said = run([str(ended)], textwrap.dedent(code), stdout=pipe_that_nobody_reads())
    told = "r2m: standard output cannot be written (Broken pipe): the command goes on without it\n"
    assert (status, said, ended.read_text()) == (0, told, "ended")


def test_files_never_take_the_place_of_standard_output_that_was_closed():
    code = """
        import os, tempfile
        from r2m_async import cli

        def main():
            with tempfile.TemporaryFile() as file:
                assert file.fileno() > 2, file.fileno()
                os.write(1, b"a library prints")
                print("and so does Python")
                assert not file.read()
            return 7

        cli.main = main
        cli.entry()
    """
    assert run([], textwrap.dedent(code), stdout=None, closed=(0, 1)) == (7, "")
