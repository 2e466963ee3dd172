"""Judgements of answer files: `r2m eval judge` uses a reward model, `r2m eval win-rate` reads a judge's annotations.

    OUT/table.md            the table that is also printed
    OUT/results.json
    OUT/rewards.jsonl       (judge) a line per answer
    OUT/annotations.json    (judge --against) a record per comparison, in AlpacaEval's form, for `r2m eval win-rate`

An annotation has `instruction`, `output_1` (the opponent's), `output_2` (the model's) and `preference`. A preference is
from 1 to 2: the higher it is, the better is output_2. 1.5 is a tie, and so is 0; null is no judgement. This is
AlpacaEval's form (`describe_head2head` in github.com/tatsu-lab/alpaca_eval, src/alpaca_eval/metrics/helpers.py). As
there, lengths are in characters.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.data.records import Record, read_file
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation.alpaca_length_control import (
    AlpacaLengthControlled,
    GamedBaselines,
    alpaca_length_controlled,
)
from r2m_async.evaluation.answers import JudgedText, Outputs, read_outputs
from r2m_async.evaluation.win_rate import Estimate, length_controlled_win_rate, mean
from r2m_async.plugins import as_number, named_function, own_failure, shown
from r2m_async.runs.records import jsonl
from r2m_async.runs.results import write_results
from r2m_async.whole import disk_errors, write_file

REFERENCE = "reference"
"""What `--against` names to compare with the authors' summaries, which are in the file itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """A judge's decision between two answers to one prompt."""

    group: Hashable
    """The same for all turns of one question."""
    instruction: str
    outputs: tuple[str, str]
    """The opponent's answer, then the model's."""
    generators: tuple[str, str]
    """The names of the opponent and of the model."""
    preference: float | None
    """From 0 for the opponent to 1 for the model. None if the judge did not decide."""


def win_rates(annotations: Sequence[Annotation], gamed: GamedBaselines | None = None) -> dict[str, Any]:
    """Win rates and their statistics by name; rates are from 0 to 1.

    gamed: AlpacaEval's gamed baselines, for its own length-controlled rate. None leaves that out.

    Raises DataError if no annotation has a preference, and as `alpaca_length_controlled` does.
    """
    judged = [(one, one.preference) for one in annotations if one.preference is not None]
    if not judged:
        raise DataError("the annotations have no preference at all: let the judge judge again")
    preferences = np.array([preference for _, preference in judged])
    lengths = np.array([[len(output) for output in one.outputs] for one, _ in judged])
    groups = [one.group for one, _ in judged]
    controlled = length_controlled_win_rate(preferences, lengths[:, 1] - lengths[:, 0], groups)
    return {
        "generator": judged[0][0].generators[1],
        "against": judged[0][0].generators[0],
        "win_rate": _told(mean(preferences, groups)),
        "length_controlled_win_rate": _told(controlled.win_rate),
        "length_effect": controlled.length_effect,
        "alpaca_eval": None if gamed is None else dataclasses.asdict(_as_alpaca_eval(annotations, gamed)),
        # Here a preference between 0 and 1 counts as a whole win or loss, and a tie as half.
        "discrete_win_rate": float(((np.sign(preferences - 0.5) + 1) / 2).mean()),
        "num_wins": int((preferences > 0.5).sum()),
        "num_losses": int((preferences < 0.5).sum()),
        "num_ties": int((preferences == 0.5).sum()),
        "num_without_preference": len(annotations) - len(judged),
        "length": float(lengths[:, 1].mean()),
        "length_against": float(lengths[:, 0].mean()),
    }


def _as_alpaca_eval(annotations: Sequence[Annotation], gamed: GamedBaselines) -> AlpacaLengthControlled:
    """AlpacaEval's own length-controlled rate, to which annotations without a preference belong, too."""
    return alpaca_length_controlled(
        [one.preference for one in annotations],
        [len(one.outputs[0]) - len(one.outputs[1]) for one in annotations],
        annotations[0].generators[0],
        gamed,
    )


# A judge's file


def read_annotations(path: str | Path) -> tuple[Annotation, ...]:
    """Reads AlpacaEval's annotations.json, which is about one model against one other. Raises `DataError`."""
    annotations = tuple(map(_annotation, read_file(path)))
    if not annotations:
        raise DataError(f"{path}: no record; give a judge's annotations")
    for index, which in ((0, "generator_1"), (1, "generator_2")):
        names = sorted({one.generators[index] for one in annotations})
        if len(names) > 1:
            raise DataError(
                f"{path}: {which} is {names[0]!r} and {names[1]!r}: a win rate is of one model against one other; "
                f"split the file"
            )
    return annotations


def _annotation(record: Record) -> Annotation:
    """The annotation of a record."""
    fields = record.fields()
    instruction = fields.get("instruction", record.place)
    outputs = tuple(record.field(key) for key in ("output_1", "output_2"))
    for key, output in zip(("output_1", "output_2"), outputs, strict=True):
        if not isinstance(output, str):
            raise record.refusal("wrong_type", key, output, "not text", "write the output as text")
    return Annotation(
        # Without a question's number every record is a group of its own.
        group=fields.get("question_id", record.place),
        instruction=str(instruction),
        outputs=(outputs[0], outputs[1]),
        generators=(str(fields.get("generator_1", "output_1")), str(fields.get("generator_2", "output_2"))),
        preference=_preference(record),
    )


def _preference(record: Record) -> float | None:
    """The preference of a record, from AlpacaEval's scale of 1 to 2 to one of 0 to 1. None for null and NaN."""
    value = record.field("preference")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
        why = "neither 0 (a tie) nor from 1 (output_1 is better) to 2 (output_2 is better)"
        raise record.refusal("wrong_type", "preference", value, why, "write null for no judgement")
    return 0.5 if value == 0 else value - 1.0


# A reward model's judgement


def judge(
    outputs: str | Path,
    judge: str,
    against: str | None = None,
    prompts: str | Path | None = None,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores an answer file with a reward model, and compares it with another answer file.

    outputs: the answer file.
    judge: a run of `r2m reward-model train`, a sequence classifier, `embedded`, an OUT of `r2m export` (its classifier,
        without the policy's feedback), or `module:attr`, a function f(prompt_text, response_text, finished) -> float
        like `evaluation.gold`.
    against: an answer file to the same prompts, or `reference`. It may have more prompts, which are left out. None
        compares nothing.
    prompts: the file of MT-Bench's questions.
    max_tokens: longest text that the judge reads, in tokens; None means what its config says.
    trust_remote_code: whether Python code that comes with the judge's files may be run.

    Returns (results by name, a record per answer, a record per comparison). Raises DataError for files that cannot be
    read or compared, and ConfigError for a judge that cannot be loaded, fails, or gives a reward that is not finite.
    """
    ours = read_outputs(outputs, prompts)
    if not ours.texts:
        raise DataError(f"{outputs}: no answer; give another file")
    scorer = _Judge(judge, max_tokens, trust_remote_code)
    rewards = scorer.rewards(ours.texts)
    results: dict[str, Any] = {
        "judge": judge,
        "outputs": str(outputs),
        "format": ours.format,
        "generator": ours.generator,
    }
    results |= _of_one(ours.texts, rewards)
    records = [
        {
            "prompt": text.instruction,
            "turn": text.turn,
            "reward": float(reward),
            "length": len(text.output),
            "finished": text.finished,
        }
        for text, reward in zip(ours.texts, rewards, strict=True)
    ]
    compared: list[dict[str, Any]] = []
    if against is not None:
        theirs = _opponents(ours, against, prompts)
        their_rewards = scorer.rewards(theirs.texts)
        results["opponent"] = _of_one(theirs.texts, their_rewards) | {"generator": theirs.generator, "outputs": against}
        annotations = []
        for ours_one, theirs_one, reward, other in zip(ours.texts, theirs.texts, rewards, their_rewards, strict=True):
            one = Annotation(
                group=ours_one.key,
                instruction=ours_one.instruction,
                outputs=(theirs_one.output, ours_one.output),
                generators=(theirs.generator, ours.generator),
                # Equal rewards are a tie, 1/2.
                preference=float((np.sign(reward - other) + 1) / 2),
            )
            annotations.append(one)
            compared.append(_compared(one, ours_one, ours.format, judge, float(reward), float(other)))
        results["comparison"] = win_rates(annotations)
    results["num_texts_cut"] = scorer.num_cut
    return results, records, compared


class _Judge:
    """The judge: a reward model, or a function of the user's own."""

    def __init__(self, judge: str, max_tokens: int | None, trust_remote_code: bool) -> None:
        """Loads the judge. A name with a colon is a function, unless there is a path of that name."""
        self._name = judge
        self._gold = self._model = None
        if ":" in judge and not Path(judge).exists():
            self._gold = named_function(judge, "--judge")
        else:
            from r2m_async.evaluation.text_scorer import TextScorer, load_ensemble

            self._model = TextScorer(load_ensemble(judge, max_tokens, trust_remote_code=trust_remote_code))

    @property
    def num_cut(self) -> int:
        """How many texts were too long for the reward model and lost their beginning."""
        return self._model.num_cut if self._model else 0

    def rewards(self, texts: Sequence[JudgedText]) -> np.ndarray:
        """Rewards [N] of N answers, all finite. Raises ConfigError naming an answer whose reward is not."""
        rewards = self._model_rewards(texts) if self._model else np.array([self._gold_reward(text) for text in texts])
        for text, reward in zip(texts, rewards, strict=True):
            if not np.isfinite(reward):
                raise ConfigError(
                    f"--judge {self._name}: its reward for {_answer_of(text)} is {reward}, which compares with none; "
                    f"correct the judge, or name another"
                )
        return rewards

    def _model_rewards(self, texts: Sequence[JudgedText]) -> np.ndarray:
        """Rewards [N] of N answers by the reward model."""
        from r2m_async.cpu_threads import one_thread

        assert self._model is not None
        with one_thread():
            return self._model.scores([(text.prompt, text.response, text.finished) for text in texts])

    def _gold_reward(self, text: JudgedText) -> float:
        """The reward of one answer by the user's function. Raises ConfigError if it fails or returns no number."""
        assert self._gold is not None
        prompt = text.prompt if isinstance(text.prompt, str) else "\n".join(said for _, said in text.prompt)
        try:
            value = self._gold(prompt, text.response, text.finished)
        except KeyboardInterrupt:  # it comes from the terminal, not from the function
            raise
        except BaseException as error:  # the user's function may raise anything, SystemExit too
            what, frames = own_failure(error)
            raise ConfigError(
                f"--judge {self._name}: cannot judge {_answer_of(text)}: {what}; correct the judge, or give it the answers "
                f"it is for{frames}"
            ) from None
        number = as_number(value)
        if number is None:
            raise ConfigError(
                f"--judge {self._name}: its reward for {_answer_of(text)} is {shown(value)}, which is no number; correct "
                f"the judge, or name another"
            )
        return number


def _answer_of(text: JudgedText) -> str:
    """For error messages: which answer it is."""
    return f"the answer to {text.instruction[:60]!r} ({text.place})"


def _of_one(texts: Sequence[JudgedText], rewards: np.ndarray) -> dict[str, Any]:
    """Mean reward, mean length and share of finished answers of one answer file."""
    # The turns of one question are one draw of the standard error.
    groups = [text.key for text in texts]
    return {
        "num_prompts": len(set(groups)),
        "num_answers": len(texts),
        "reward": _told(mean(rewards, groups)),
        "length": float(np.mean([len(text.output) for text in texts])),
        "finished": float(np.mean([text.finished for text in texts])),
    }


def _opponents(ours: Outputs, against: str, prompts: str | Path | None) -> Outputs:
    """For each answer of `ours` the opponent's answer to the same prompt, in the same order.

    Raises DataError if an answer is missing or there are two, and ConfigError for files of different formats.
    """
    if against == REFERENCE:
        return Outputs(format=ours.format, generator=REFERENCE, texts=tuple(map(_reference, ours.texts)))
    theirs = read_outputs(against, prompts)
    if theirs.format != ours.format:
        raise ConfigError(
            f"--against {against}: is of format {theirs.format} and OUTPUTS of {ours.format}; give one format"
        )
    by_key = _by_key(theirs, against)
    _by_key(ours, "OUTPUTS")  # raises if it has two answers to one prompt
    missing = [text for text in ours.texts if (text.key, text.turn) not in by_key]
    if missing:
        raise DataError(
            f"--against {against}: has no answer to {len(missing)} of {len(ours.texts)} prompts, the first "
            f"{missing[0].instruction[:60]!r}; generate both from one prompt file"
        )
    texts = tuple(by_key[text.key, text.turn] for text in ours.texts)
    return Outputs(format=theirs.format, generator=theirs.generator, texts=texts)


def _by_key(outputs: Outputs, name: str) -> dict[tuple[Hashable, int], JudgedText]:
    """The answers of a file by prompt and turn. Raises DataError if two have the same."""
    found: dict[tuple[Hashable, int], JudgedText] = {}
    for text in outputs.texts:
        if (text.key, text.turn) in found:
            raise DataError(
                f"{name}: two answers to the prompt {text.instruction[:60]!r}, and only one can be compared; keep one"
            )
        found[text.key, text.turn] = text
    return found


def _reference(text: JudgedText) -> JudgedText:
    """The author's summary as an opponent's answer. Raises DataError if the file has none."""
    if text.reference is None:
        raise DataError(
            f"--against {REFERENCE}: the answer to {text.instruction[:60]!r} has no reference_summary; name a file of answers"
        )
    return JudgedText(
        place=text.place,
        key=text.key,
        turn=text.turn,
        prompt=text.prompt,
        response=f" {text.reference}" if isinstance(text.prompt, str) else text.reference,
        output=text.reference,
        finished=True,
        reference=text.reference,
    )


def _compared(
    one: Annotation, text: JudgedText, form: str, judge: str, reward: float, reward_against: float
) -> dict[str, Any]:
    """A comparison as a record of annotations.json."""
    assert one.preference is not None
    asked = {"question_id": one.group, "turn": text.turn} if form == "mt_bench" else {}
    return asked | {
        "instruction": one.instruction,
        "output_1": one.outputs[0],
        "generator_1": one.generators[0],
        "output_2": one.outputs[1],
        "generator_2": one.generators[1],
        "annotator": judge,
        "preference": 1 + one.preference,
        "reward_1": reward_against,
        "reward_2": reward,
    }


# What is written


def write_judgement(judged: tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]], out: Path) -> str:
    """Writes what `judge` returned as the files of OUT, and returns the table."""
    results, records, compared = judged
    rows = [_row(results), *([_row(results["opponent"])] if "opponent" in results else [])]
    head = "| | reward | 95 % interval | answers | characters | finished |\n|---|---|---|---|---|---|\n"
    told = f"# judged by {results['judge']}\n\n{head}{''.join(rows)}"
    if "comparison" in results:
        told += f"\n{win_rate_table(results['comparison'])}"
    if results["num_texts_cut"]:
        told += f"\n{results['num_texts_cut']} texts were longer than the judge reads and lost their beginning.\n"
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        # One from an earlier command would not belong to these results.
        (out / "annotations.json").unlink(missing_ok=True)
    if compared:
        write_file(out / "annotations.json", json.dumps(compared, indent=2, ensure_ascii=False) + "\n")
    write_file(out / "rewards.jsonl", jsonl(records))
    write_results(out, results, told)  # last: where results.json is, all other files are, too
    return told


def win_rate_table(results: Mapping[str, Any]) -> str:
    """The results of `win_rates` as Markdown. SE is a standard error over prompts."""
    plain, controlled = results["win_rate"], results["length_controlled_win_rate"]
    lines = [
        f"| {results['generator']} against {results['against']} | |",
        "|---|---|",
        f"| win rate, ties half, ± SE | {_percent(plain)} |",
        f"| length-controlled win rate, ± SE | {_percent(controlled)} |",
        f"| wins, ties, losses | {results['num_wins']}, {results['num_ties']}, {results['num_losses']} |",
        f"| characters, mean | {results['length']:.0f} against {results['length_against']:.0f} |",
        f"| length effect, log-odds | {results['length_effect']:.2f} |",
    ]
    if alpaca := results["alpaca_eval"]:
        lines.insert(4, f"| AlpacaEval's length-controlled win rate | {alpaca['win_rate']:.1%} |")
    if results["num_without_preference"]:
        lines.append(f"| left out, without a preference | {results['num_without_preference']} |")
    return "".join(line + "\n" for line in lines)


def _row(one: Mapping[str, Any]) -> str:
    """A row of the table of rewards, for one answer file."""
    reward = one["reward"]
    interval = f"± {reward['half_width']:.3f}"
    return (
        f"| {one['generator']} | {reward['value']:.3f} | {interval} | {one['num_answers']} | {one['length']:.0f} | "
        f"{one['finished']:.0%} |\n"
    )


def _told(estimate: Estimate) -> dict[str, Any]:
    """An estimate by name, for results.json."""
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "half_width": estimate.half_width,
        "num_groups": estimate.num_groups,
    }


def _percent(rate: Mapping[str, float]) -> str:
    """A rate ± its standard error, in percent."""
    return f"{rate['value']:.1%} ± {rate['standard_error']:.1%}"
