"""Rollout functions that tests name in a config, and what they need. They are read by processes of Ray, too."""

import asyncio
import threading
import time

from r2m_async.rollouts import ResponseEnded, Rollout

STARTED, GO_ON = threading.Event(), threading.Event()
"""Set by a function that has begun, and waited for by it. Tests that use them clear them first."""
SEEN: list = []
"""What functions noted for a test in the same process."""


async def once(rollout: Rollout) -> None:
    """A single turn, as without a function."""
    await rollout.generate()


async def in_turns(rollout: Rollout, *, turns: int = 3, tokens: int = 2, says: str = " river stone") -> None:
    """Turns of some tokens, each answered by the environment; what it says depends on what the policy wrote."""
    words = ("the", "a", "river", "stone", "wind")
    for number in range(turns):
        turn = await rollout.generate(max_new_tokens=tokens, stop=["wind"])
        rollout.info[f"turn {number}"] = turn.text
        await asyncio.sleep(0)
        rollout.append(f"{says} {words[sum(turn.token_ids) % 5]}")


async def writes_alone(rollout: Rollout) -> None:
    """The environment alone writes."""
    rollout.append(" one two")


async def nothing(rollout: Rollout) -> None:
    """Nobody writes anything."""


async def mixed(rollout: Rollout) -> None:
    """By the index of the response: several turns, one, the environment alone."""
    await [in_turns, once, writes_alone][rollout.index % 3](rollout)


async def over_the_limit(rollout: Rollout) -> None:
    """Writes until there is no room, and notes how it ended."""
    try:
        while True:
            await rollout.generate(max_new_tokens=1)
            rollout.append(" one")
    except ResponseEnded:
        rollout.info["ended"] = True
        raise
    finally:
        rollout.info["finally"] = True


async def with_messages(rollout: Rollout, *, turns: int = 2) -> None:
    """A conversation, through the chat template."""
    for number in range(turns):
        await rollout.generate(max_new_tokens=3)
        rollout.append_messages([{"role": "user", "content": f"number {number}"}])
    await rollout.generate(max_new_tokens=3)
    rollout.info["messages"] = rollout.messages


def plain(rollout: Rollout) -> None:
    """No coroutine function."""


async def raises(rollout: Rollout) -> None:
    await rollout.generate(max_new_tokens=1)
    raise KeyError("my tool broke")


async def leaves(rollout: Rollout) -> None:
    raise SystemExit(3)


async def cancels_itself(rollout: Rollout) -> None:
    raise asyncio.CancelledError


async def returns(rollout: Rollout):
    return 0.5


async def notes_what_is_no_json(rollout: Rollout) -> None:
    rollout.info["tool"] = {"a": [object()]}


async def notes_too_much(rollout: Rollout) -> None:
    rollout.info["tool"] = "x" * 20_000


async def notes_itself(rollout: Rollout) -> None:
    rollout.info["all"] = rollout.info


async def writes_too_long_a_text(rollout: Rollout) -> None:
    rollout.text = "x" * 20_000


async def two_turns_at_once(rollout: Rollout) -> None:
    await asyncio.gather(rollout.generate(), rollout.generate())


async def leaves_a_turn_alone(rollout: Rollout) -> None:
    SEEN.append(asyncio.ensure_future(rollout.generate()))
    await asyncio.sleep(0)


async def says_its_own(rollout: Rollout) -> None:
    await rollout.generate()
    rollout.text = "warm wind"
    rollout.info["reward"] = 0.25 + rollout.index


async def hangs(rollout: Rollout) -> None:
    """Waits for ever, and notes that it was ended."""
    await rollout.generate(max_new_tokens=1)
    try:
        STARTED.set()
        await asyncio.Event().wait()
    finally:
        SEEN.append("finally")


async def blocks(rollout: Rollout) -> None:
    """Holds the event loop until a test lets it go."""
    await rollout.generate(max_new_tokens=1)
    STARTED.set()
    GO_ON.wait()
    SEEN.append("went on")
    try:
        await rollout.generate(max_new_tokens=1)
    except ResponseEnded:
        SEEN.append("ended")
        raise


async def shows_itself(rollout: Rollout) -> None:
    """Lets a test look at the rollout, and waits for a turn."""
    SEEN.append(rollout)
    await rollout.generate()


async def repeats_an_end(rollout: Rollout) -> None:
    """The environment spells out the end of text twice: as text, and as the token."""
    await rollout.generate(max_new_tokens=1)
    rollout.append("</s>")
    rollout.append("</s>", special_tokens=True)


async def takes_its_time(rollout: Rollout) -> None:
    time.sleep(0.2)
    await rollout.generate()


def noted(response, info) -> float:
    """A reward function: what the rollout function noted."""
    return info["reward"]


def length_of_notes(response: str, info: dict) -> float:
    """A reward function that depends on everything that was noted."""
    return (sum(map(len, map(str, info.values()))) + len(response)) % 7 / 7


async def reads_first(rollout: Rollout) -> None:
    """The environment says the same to all responses, at length, before the policy writes."""
    rollout.append(" one two three" * 14)
    await rollout.generate(max_new_tokens=4)


async def changes_its_columns(rollout: Rollout, *, words: list) -> None:
    """Takes what is its own."""
    await rollout.generate(max_new_tokens=1)
    rollout.prompt.columns["cases"].append(len(words))
    words.append(rollout.index)
    SEEN.append((rollout.prompt.columns["cases"], words))
