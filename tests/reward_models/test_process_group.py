"""What one rank does for all: the others wait for it, and learn of it if it fails."""

import datetime
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from r2m_async.errors import ConfigError, StageLost
from r2m_async.reward_models.process_group import first_rank_first, made_by_first


def fails() -> Path:
    raise ConfigError("run.output_dir: cannot be written")


def rank_of_two(rank: int, rendezvous: Path, out: Path, learnt) -> None:
    """The first rank stays alive until the other has learnt of its failures, so that it is not told by a lost connection."""
    timeout = datetime.timedelta(seconds=40)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timeout)
    lines = []
    with first_rank_first():
        if rank == 0:
            (out / "built").touch()
        lines.append(f"entered, built {(out / 'built').exists()}")
    lines.append(f"made {made_by_first(lambda: Path(f'made-by-{rank}'))}")
    for error in (ConfigError("no such model"), KeyboardInterrupt("Ctrl-C")):
        try:
            with first_rank_first():
                lines.append("entered")
                if rank == 0:
                    raise error
        except (ConfigError, StageLost, KeyboardInterrupt) as caught:
            lines.append(f"{type(caught).__name__}: {caught}")
    try:
        made_by_first(fails)
    except (ConfigError, StageLost) as caught:
        lines.append(f"{type(caught).__name__}: {caught}")
    lines.append(f"made {made_by_first(lambda: Path('afterwards'))}")  # and all are in step
    (out / f"rank-{rank}").write_text("\n".join(lines))
    if rank == 1:
        learnt.set()
    assert learnt.wait(100)
    dist.destroy_process_group()  # as the command does: gloo's threads, still running at the end, would abort the process


@pytest.mark.models
def test_the_other_rank_waits_for_the_first_and_ends_with_it_at_once_if_it_fails(tmp_path):
    learnt = torch.multiprocessing.get_context("spawn").Event()
    torch.multiprocessing.spawn(rank_of_two, (tmp_path / "rendezvous", tmp_path, learnt), nprocs=2)
    told = "the first rank failed, and this one ends with it: "
    assert (tmp_path / "rank-0").read_text().splitlines() == [
        "entered, built True",
        "made made-by-0",
        "entered",
        "ConfigError: no such model",
        "entered",
        "KeyboardInterrupt: Ctrl-C",
        "ConfigError: run.output_dir: cannot be written",
        "made afterwards",
    ]
    assert (tmp_path / "rank-1").read_text().splitlines() == [
        "entered, built True",
        "made made-by-0",
        f"StageLost: {told}ConfigError: no such model",
        f"StageLost: {told}KeyboardInterrupt: Ctrl-C",
        f"StageLost: {told}ConfigError: run.output_dir: cannot be written",
        "made afterwards",
    ]


def test_alone_the_first_rank_is_the_only_one():
    with first_rank_first():
        assert made_by_first(lambda: Path("x")) == Path("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        made_by_first(fails)
