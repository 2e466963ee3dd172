"""Judgements of answer files: `r2m eval judge`, by a reward model, and `r2m eval win-rate`, by a judge's annotations.

    OUT/table.md            what it also prints
    OUT/results.json
    OUT/rewards.jsonl       (judge) a line per answer
    OUT/annotations.json    (judge --against) a record per comparison, in AlpacaEval's form: `r2m eval win-rate` reads it

An annotation has `instruction`, `output_1` (the opponent's), `output_2` (the model's) and `preference`: 1 to 2, the
higher the more for output_2; 0 and 1.5 are ties, null is no judgement. So AlpacaEval has them (`describe_head2head` in
github.com/tatsu-lab/alpaca_eval, src/alpaca_eval/metrics/helpers.py). Lengths are characters, as there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r2m_async.data.records import Record
from r2m_async.errors import ConfigError, DataError
from r2m_async.evaluation.answers import JudgedText, Outputs, read_outputs
from r2m_async.evaluation.questions import read_file
from r2m_async.evaluation.win_rate import Estimate, length_controlled_win_rate, mean
from r2m_async.plugins import as_number, named_function, own_failure, shown
from r2m_async.runs.records import jsonl
from r2m_async.runs.results import write_results
from r2m_async.whole import disk_errors, write_file

REFERENCE = "reference"
"""`--against reference`: the authors' summaries in the file itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One comparison."""

    group: Hashable
    """The same for the turns of one question."""
    instruction: str
    outputs: tuple[str, str]
    """The opponent's, the model's."""
    generators: tuple[str, str]
    preference: float | None
    """0 to 1, 1 for the model; None where the judge gave none."""


def win_rates(annotations: Sequence[Annotation]) -> dict[str, Any]:
    """Results by name; rates in 0 ... 1. Raises DataError where no annotation has a preference."""
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
        "discrete_win_rate": float(((np.sign(preferences - 0.5) + 1) / 2).mean()),
        "num_wins": int((preferences > 0.5).sum()),
        "num_losses": int((preferences < 0.5).sum()),
        "num_ties": int((preferences == 0.5).sum()),
        "num_without_preference": len(annotations) - len(judged),
        "length": float(lengths[:, 1].mean()),
        "length_against": float(lengths[:, 0].mean()),
    }


# A judge's file


def read_annotations(path: str | Path) -> tuple[Annotation, ...]:
    """AlpacaEval's annotations.json, of one model against one other. Raises `DataError`."""
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
    fields = record.fields()
    instruction = fields.get("instruction", record.place)
    outputs = tuple(record.field(key) for key in ("output_1", "output_2"))
    for key, output in zip(("output_1", "output_2"), outputs, strict=True):
        if not isinstance(output, str):
            raise record.refusal("wrong_type", key, output, "not text", "write the output as text")
    return Annotation(
        group=fields.get("question_id", record.place),
        instruction=str(instruction),
        outputs=(outputs[0], outputs[1]),
        generators=(str(fields.get("generator_1", "output_1")), str(fields.get("generator_2", "output_2"))),
        preference=_preference(record),
    )


def _preference(record: Record) -> float | None:
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
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(results by name, a record per answer, a record per comparison).

    judge: a run of `reward-model train`, a sequence classifier, `embedded`, an OUT of `r2m export` (its classifier, without
        the policy's feedback), or `module:attr`, f(prompt_text, response_text, finished) -> float, as `evaluation.gold`.
    against: answers to the same prompts, or `reference`; more prompts than `outputs` has are left out.
    prompts: MT-Bench's questions.
    Raises ConfigError, also for a judge that fails or whose reward is not finite, and DataError.
    """
    ours = read_outputs(outputs, prompts)
    if not ours.texts:
        raise DataError(f"{outputs}: no answer; give another file")
    scorer = _Scorer(judge, max_tokens)
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
                preference=float((np.sign(reward - other) + 1) / 2),
            )
            annotations.append(one)
            compared.append(_compared(one, ours_one, ours.format, judge, float(reward), float(other)))
        results["comparison"] = win_rates(annotations)
    results["num_texts_cut"] = scorer.num_cut
    return results, records, compared


class _Scorer:
    def __init__(self, judge: str, max_tokens: int | None) -> None:
        self._name = judge
        self._gold = self._model = None
        if ":" in judge and not Path(judge).exists():
            self._gold = named_function(judge, "--judge")
        else:
            from r2m_async.evaluation.text_scorer import TextScorer, load_ensemble

            self._model = TextScorer(load_ensemble(judge, max_tokens))

    @property
    def num_cut(self) -> int:
        return self._model.num_cut if self._model else 0

    def rewards(self, texts: Sequence[JudgedText]) -> np.ndarray:
        """[N], finite"""
        rewards = self._model_rewards(texts) if self._model else np.array([self._gold_reward(text) for text in texts])
        for text, reward in zip(texts, rewards, strict=True):
            if not np.isfinite(reward):
                raise ConfigError(
                    f"--judge {self._name}: its reward for {_answer_of(text)} is {reward}, which compares with none; "
                    f"correct the judge, or name another"
                )
        return rewards

    def _model_rewards(self, texts: Sequence[JudgedText]) -> np.ndarray:
        from r2m_async.models.loading import one_thread

        assert self._model is not None
        with one_thread():
            return self._model.scores([(text.prompt, text.response, text.finished) for text in texts])

    def _gold_reward(self, text: JudgedText) -> float:
        assert self._gold is not None
        prompt = text.prompt if isinstance(text.prompt, str) else "\n".join(said for _, said in text.prompt)
        try:
            value = self._gold(prompt, text.response, text.finished)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's program may raise anything, SystemExit too
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
    return f"the answer to {text.instruction[:60]!r} ({text.place})"


def _of_one(texts: Sequence[JudgedText], rewards: np.ndarray) -> dict[str, Any]:
    groups = [text.key for text in texts]
    return {
        "num_prompts": len(set(groups)),
        "num_answers": len(texts),
        "reward": _told(mean(rewards, groups)),
        "length": float(np.mean([len(text.output) for text in texts])),
        "finished": float(np.mean([text.finished for text in texts])),
    }


def _opponents(ours: Outputs, against: str, prompts: str | Path | None) -> Outputs:
    """Of every answer of `ours` its opponent, in their order."""
    if against == REFERENCE:
        return Outputs(format=ours.format, generator=REFERENCE, texts=tuple(map(_reference, ours.texts)))
    theirs = read_outputs(against, prompts)
    if theirs.format != ours.format:
        raise ConfigError(
            f"--against {against}: is of format {theirs.format} and OUTPUTS of {ours.format}; give one format"
        )
    by_key = _by_key(theirs, against)
    _by_key(ours, "OUTPUTS")
    missing = [text for text in ours.texts if (text.key, text.turn) not in by_key]
    if missing:
        raise DataError(
            f"--against {against}: has no answer to {len(missing)} of {len(ours.texts)} prompts, the first "
            f"{missing[0].instruction[:60]!r}; generate both from one prompt file"
        )
    texts = tuple(by_key[text.key, text.turn] for text in ours.texts)
    return Outputs(format=theirs.format, generator=theirs.generator, texts=texts)


def _by_key(outputs: Outputs, name: str) -> dict[tuple[Hashable, int], JudgedText]:
    found: dict[tuple[Hashable, int], JudgedText] = {}
    for text in outputs.texts:
        if (text.key, text.turn) in found:
            raise DataError(
                f"{name}: two answers to the prompt {text.instruction[:60]!r}, which of them to compare is open; keep one"
            )
        found[text.key, text.turn] = text
    return found


def _reference(text: JudgedText) -> JudgedText:
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
    """What `judge` returned, as OUT's files; returns the table."""
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
        (out / "annotations.json").unlink(missing_ok=True)
    if compared:
        write_file(out / "annotations.json", json.dumps(compared, indent=2, ensure_ascii=False) + "\n")
    write_file(out / "rewards.jsonl", jsonl(records))
    write_results(out, results, told)  # last: where results.json is, all is
    return told


def win_rate_table(results: Mapping[str, Any]) -> str:
    """Markdown; ± is a standard error, over prompts."""
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
    if results["num_without_preference"]:
        lines.append(f"| left out, without a preference | {results['num_without_preference']} |")
    return "".join(line + "\n" for line in lines)


def _row(one: Mapping[str, Any]) -> str:
    reward = one["reward"]
    interval = f"± {reward['half_width']:.3f}"
    return (
        f"| {one['generator']} | {reward['value']:.3f} | {interval} | {one['num_answers']} | {one['length']:.0f} | "
        f"{one['finished']:.0%} |\n"
    )


def _told(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "half_width": estimate.half_width,
        "num_groups": estimate.num_groups,
    }


def _percent(rate: Mapping[str, float]) -> str:
    return f"{rate['value']:.1%} ± {rate['standard_error']:.1%}"
