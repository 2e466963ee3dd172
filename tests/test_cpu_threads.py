"""Every Python thread computes with as many CPU threads as the one that has set their number: else bits differ by chance."""

import os
import subprocess
import sys

# What OpenMP has started it keeps, so one more thread of the process shows that a product took more than one.
PROGRAM = """
import asyncio, os, sys
import psutil, torch

torch.set_num_threads(1)
a = torch.ones(500, 500)
seen = []

def product():
    before = psutil.Process().num_threads()
    a @ a
    seen.append((before, psutil.Process().num_threads()))

async def awaited():
    product()

def in_a_bare_thread():
    import threading
    thread = threading.Thread(target=product)
    thread.start()
    thread.join()

def on_the_controllers_loop():
    from r2m_async.launch.loop_thread import LoopThread
    loop = LoopThread("test")
    loop.run(awaited(), patience=30.0)
    loop.stop()

def on_a_loop_of_users_functions():
    from r2m_async.function_loops import turning_loop
    asyncio.run_coroutine_threadsafe(awaited(), turning_loop("test")).result(30)

def in_a_reward_function():
    from r2m_async.rewards.calls import _in_thread
    ended, _ = _in_thread(product, "test")
    ended.result(30)

def in_a_stage():
    import threading
    from r2m_async.codec import encode
    from r2m_async.launch.ray_stages import _Process
    process = _Process.__new__(_Process)
    process._stage, process._opaque = type("Stage", (), {"work": lambda self: product()})(), False
    thread = threading.Thread(target=process.call, args=("work", bytes(encode(()))))
    thread.start()
    thread.join()

for where in sys.argv[1:]:
    # A process each, whose threads nobody else starts and ends. The imports are made once.
    if not (pid := os.fork()):
        globals()[where]()
        ((before, after),) = seen
        print("more threads:", where, after - before, flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, where
"""
SHARING = ["on_the_controllers_loop", "on_a_loop_of_users_functions", "in_a_reward_function", "in_a_stage"]


def test_a_product_in_a_new_thread_takes_one_cpu_thread_where_one_was_set():
    """But for one that shares nothing, which takes as many as the environment says: so the others could fail."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SHARING, "in_a_bare_thread"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    told = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("more threads:")]
    assert told == [*([where, "0"] for where in SHARING), ["in_a_bare_thread", "1"]]
