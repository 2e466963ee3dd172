import asyncio
import os
import threading

import torch

from r2m_async.function_loops import OncePerProcess, turning_loop


def test_a_thing_is_made_once_and_again_in_a_process_that_was_forked():
    made = []
    once = OncePerProcess(lambda: made.append(os.getpid()) or len(made))
    assert [once(), once()] == [1, 1]
    child = os.fork()
    if child == 0:
        os._exit(once())  # the second thing that was made, as this process counts
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert once() == 1 and made == [os.getpid()]


def test_a_loop_turns_in_a_thread_of_its_name_and_keeps_no_graph():
    async def where():
        return threading.current_thread().name, torch.is_grad_enabled()

    assert asyncio.run_coroutine_threadsafe(where(), turning_loop("turns")).result(10) == ("turns", False)
