"""Reads the prompts of a run's config, and checks its data for `r2m check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from r2m_async.codec import encoded_size
from r2m_async.config import R2MConfig
from r2m_async.data.chat import TemplateRefusal
from r2m_async.data.pairs import Preference, read_prompt
from r2m_async.data.prompts import load_preferences, load_prompts
from r2m_async.data.records import Record, load_records
from r2m_async.data.sources import is_local, items_of
from r2m_async.errors import ConfigError, DataError
from r2m_async.from_scratch.languages import LANGUAGES
from r2m_async.labels.functions import KNOWN as LABELLER_KNOWS
from r2m_async.labels.sources import missing_columns
from r2m_async.launch.model_checks import Reader, prompt_check, shown
from r2m_async.models.pairs import offline_group
from r2m_async.models.tokens import unknown_token
from r2m_async.plugins import nearest
from r2m_async.rewards.arguments import INFO, KNOWN, keys_read
from r2m_async.rewards.calls import functions_of, gold_of
from r2m_async.trajectories import Prompt, TrajectoryGroup


def record_options(config: R2MConfig) -> dict[str, Any]:
    """The keyword arguments of the functions that read records, as the section `data` gives them."""
    data = config.data
    keys = ("on_bad_record", "prompt_field", "columns", "chat", "split")
    return {key: getattr(data, key) for key in keys}


def read_prompts(
    config: R2MConfig, tokenizer: object | None, problem: Callable[[Prompt], str | None]
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...], dict[str, int]]:
    """Reads the prompts of a config.

    Args:
        config: the config of the run.
        tokenizer: the tokenizer of the policy. None leaves the embedded language's prompts without tokens.
        problem: says why a model cannot use a prompt, or returns None if all can (`prompt_check`).

    Returns (prompts to train on, held-out prompts, number of records left out by reason). Raises ConfigError if there
    are too few prompts or too long ones, and DataError if a source or a record cannot be used.
    """
    data, evaluation = config.data, config.evaluation
    held = evaluation.num_prompts if evaluation.every else 0
    language = LANGUAGES.get(data.prompts)
    if language is not None:
        if held > language.num_held_out_prompts:
            raise ConfigError(
                f"evaluation.num_prompts is {held}; the embedded language has {language.num_held_out_prompts} held-out prompts"
            )
        texts = language.prompts(language.num_training_prompts, 0), language.prompts(held, 0, held_out=True)
        train, test = (tuple(_language_prompt(data.prompts, text, tokenizer) for text in some) for some in texts)
        longest = max(len(prompt.token_ids) for prompt in (*train, *test))
        if longest > config.rollouts.max_prompt_tokens:
            raise ConfigError(
                f"rollouts.max_prompt_tokens is {config.rollouts.max_prompt_tokens}; the embedded language's prompts take up "
                f"to {longest} tokens"
            )
        return train, test, {}
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_prompt_tokens": config.rollouts.max_prompt_tokens,
        "filters": data.filters,
        "problem": problem,
        **record_options(config),
    }
    loaded = load_prompts(data.prompts, **options)
    skipped = Counter(loaded.skipped)
    if data.eval is not None and held:
        others = load_prompts(data.eval, **options | {"split": data.eval_split or data.split}, limit=held)
        if len(others.prompts) < held:
            raise ConfigError(
                f"evaluation.num_prompts is {held} and data.eval has {len(others.prompts)} usable prompts: lower it"
            )
        return loaded.prompts, others.prompts, dict(skipped + Counter(others.skipped))
    # Without a source of their own, the last prompts are held out.
    if held >= len(loaded.prompts):
        raise ConfigError(
            f"evaluation.num_prompts is {held} and data.prompts has {len(loaded.prompts)} usable prompts: nothing would "
            f"be left to train on; lower it, or name held-out prompts in data.eval"
        )
    cut = len(loaded.prompts) - held
    return loaded.prompts[:cut], loaded.prompts[cut:], dict(skipped)


def read_offline(
    config: R2MConfig, readers: Mapping[str, Reader]
) -> tuple[tuple[TrajectoryGroup, ...], dict[str, int]]:
    """Reads the pairs of `labels.offline`. readers: the models of the run, by key, the policy among them.

    Returns each pair as a group of two (`models.pairs.offline_group`), and how many records were left out by reason. A pair
    is left out if its prompt or a response is longer than `rollouts.max_prompt_tokens` and `rollouts.max_new_tokens` allow.

    Raises DataError if the source cannot be used, if a model of the run cannot read a pair, or if no pair is short enough.
    """
    source = config.labels.offline
    if source is None:
        return (), {}
    limits, policy, problem = config.rollouts, readers["model.policy"], prompt_check(readers)
    groups: list[TrajectoryGroup] = []

    def take(pair: Preference) -> str | None:
        """Keeps a pair that is short enough, or says why a model cannot read it."""
        try:
            group = offline_group(len(groups), pair.prompt, (pair.chosen, pair.rejected), policy.tokenizer)
        except TemplateRefusal as error:
            return f"the tokenizer's chat template refuses it ({error.reason})"
        ids = [number for one in group.trajectories for number in one.token_ids.tolist()]
        if (unknown := unknown_token(ids, policy.config)) is not None:
            return f"its token {policy.tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}) has no embedding in model.policy"
        if why := problem(group.ticket.prompt):
            return why
        responses = [one.num_response_tokens for one in group.trajectories]
        if group.trajectories[0].prompt_len <= limits.max_prompt_tokens and max(responses) <= limits.max_new_tokens:
            groups.append(group)
        return None

    if source == "embedded":
        from r2m_async.from_scratch.preferences import embedded_preferences

        loaded = load_preferences(str(embedded_preferences().training), problem=take)
    else:
        loaded = load_preferences(source, **record_options(config), problem=take)
    if not groups:
        raise DataError(
            f"labels.offline {source!r}: none of its {len(loaded.pairs)} pairs fits into rollouts.max_prompt_tokens "
            f"{limits.max_prompt_tokens} and rollouts.max_new_tokens {limits.max_new_tokens}; raise them, or name other pairs"
        )
    too_long = len(loaded.pairs) - len(groups)
    return tuple(groups), {**loaded.skipped, **({"longer than rollouts allow": too_long} if too_long else {})}


def _language_prompt(language: str, text: str, tokenizer: object | None) -> Prompt:
    """A prompt of an embedded language. language: its name."""
    ids = () if tokenizer is None else tuple(tokenizer(text)["input_ids"])  # type: ignore[operator]
    return Prompt(prompt_id=f"{language}:{text}", content=text, text=text, token_ids=ids)


def column_bytes(prompts: Sequence[Prompt]) -> int:
    """Returns the most bytes that the columns of one of these prompts take. A group in the queue carries them, too."""
    return max((encoded_size(dict(prompt.columns)) for prompt in prompts if prompt.columns), default=0)


def check_columns(config: R2MConfig, records: Iterable[tuple[str, Collection[str]]]) -> None:
    """Checks that the data has the columns that the reward functions and `labels.source` ask for.

    Args:
        config: the config of the run.
        records: for each record its name and the names of its columns.

    Raises ConfigError, naming the record and the parameter, if a record lacks a column without which a function cannot
    be called, or if some records have a column by which a function would be called in another way.
    """
    gold = gold_of(config)
    functions, first = [*functions_of(config), *([gold] if gold else [])], dict[str, tuple[str | None, str]]()
    noted = () if config.rollouts.function is None else (INFO,)
    for record, own_columns in records:
        columns = (*own_columns, *noted)
        if lacking := missing_columns(config, own_columns):
            raise ConfigError(
                f"labels.source {config.labels.source!r} asks for {' and '.join(map(repr, lacking))}, and {record} has no such "
                f"column{nearest(lacking[0], [*LABELLER_KNOWS, *own_columns])}; it is given {', '.join(LABELLER_KNOWS)}, the columns of "
                f"the record ({', '.join(own_columns) or 'none here'}) and `labels.options`; give the parameter a default, or set "
                f"the option"
            )
        for one in functions:
            style, asks = one.signature.style(columns), f"{one.key} {one.setting.function!r}"
            if style is None and (unknown := one.signature.unknown(columns)):
                raise ConfigError(
                    f"{asks} asks for {' and '.join(map(repr, unknown))}, and {record} has no such column"
                    f"{nearest(unknown[0], [*KNOWN, *columns])}; a reward function is given {', '.join((*KNOWN, *noted))}, the columns "
                    f"of the record ({', '.join(own_columns) or 'none here'}) and its `options`; give the parameter a "
                    f"default, or take the function out"
                )
            known, since = first.setdefault(one.key + one.name, (style, record))
            if style != known:
                raise ConfigError(
                    f"{asks} would be called in two ways, because {since} and {record} have different columns: rename its "
                    f"parameters, to `prompt` and `response` if they are these"
                )


def columns_to_tell(config: R2MConfig, records: Sequence[tuple[str, Collection[str]]]) -> list[str]:
    """Returns what to tell of columns that functions take from their `**kwargs`, and that some records lack.

    Such a function may do without them, so this is no error. It would be one in the middle of a run. Arguments are those of
    `check_columns`.
    """
    gold, known = gold_of(config), {*KNOWN, *([] if config.rollouts.function is None else [INFO])}
    functions = [*functions_of(config), *([gold] if gold else [])]
    reads = [
        (f"{one.key} {one.setting.function!r}", name)
        for one in functions
        for name in keys_read(one.call)
        if name not in {*known, *one.setting.options}
    ]
    lacking = {read: [record for record, columns in records if read[1] not in columns] for read in reads}
    return [
        f"{asks} takes {name!r} from its keyword arguments, and {len(found)} of {len(records)} records have no such column, {found[0]} "
        f"first: a call without it may fail in the middle of the run; correct the name, or make it a parameter"
        for (asks, name), found in lacking.items()
        if found
    ]


def sources_are_here(config: R2MConfig) -> bool:
    """Returns whether the data that models are built from are on this machine."""
    sources = (config.data.prompts, config.data.preferences)
    return all(is_local(item) for one in sources if one is not None and one not in LANGUAGES for item in items_of(one))


def check_data(config: R2MConfig, readers: Mapping[str, Reader], tell: Callable[[str], None]) -> int:
    """Reads the data of a config that are on this machine, and tells what is in them. It fetches none.

    Args:
        config: the config of the run.
        readers: the policy and the reward model, by key, as far as they are here. Without the policy, lengths are not
            checked.
        tell: gets each line.

    Returns the most bytes that the columns of a prompt take, as far as it is known. Raises ConfigError and DataError as
    `read_prompts` does.
    """
    data, policy = config.data, readers.get("model.policy")
    keys = ["prompts", *(["eval"] if data.eval is not None and config.evaluation.every else [])]
    if "from_scratch" in (config.model.policy, config.reward.model) and data.preferences is not None:
        keys.append("preferences")
    _check_offline(config, readers, tell)
    sources = {key: getattr(data, key) for key in keys}
    away = [key for key, one in sources.items() if one not in LANGUAGES and not all(map(is_local, items_of(one)))]
    for key in away:
        tell(f"data.{key}: {sources[key]} is fetched and checked by `r2m train`")
    if "preferences" in sources and "preferences" not in away:
        pairs = load_preferences(sources["preferences"], **record_options(config))
        tell(f"data.preferences: {len(pairs.pairs)} pairs{_left_out(pairs.skipped)}")
    if {"prompts", "eval"}.isdisjoint(away) and (policy is not None or data.prompts in LANGUAGES):
        prompts, held_out, skipped = read_prompts(config, policy and policy.tokenizer, prompt_check(readers))
        tell(f"data.prompts: {len(prompts)} prompts, {len(held_out)} held out{_left_out(skipped)}")
        _tell_columns(config, [(one.prompt_id, one.columns) for one in (*prompts, *held_out)], tell)
        if policy is not None:
            for line in shown(prompts[0], readers):
                tell(line)
        return column_bytes((*prompts, *held_out))
    for key, source in sources.items():
        if key not in (*away, "preferences") and source not in LANGUAGES:
            _check_records(config, key, tell)
    return 0


def _check_offline(config: R2MConfig, readers: Mapping[str, Reader], tell: Callable[[str], None]) -> None:
    """Reads the pairs of `labels.offline` if they are on this machine, and tells how many there are."""
    source = config.labels.offline
    if source in (None, "embedded"):
        return
    if "model.policy" not in readers or not all(map(is_local, items_of(source))):
        tell(f"labels.offline: {source} is checked by `r2m train`, once it has the pairs and the policy")
        return
    pairs, skipped = read_offline(config, readers)
    tell(f"labels.offline: {len(pairs)} pairs{_left_out(skipped)}")


def _check_records(config: R2MConfig, key: str, tell: Callable[[str], None]) -> None:
    """Reads the records of a source without a tokenizer, and tells how many there are. Raises DataError."""
    data = config.data
    split = data.eval_split or data.split if key == "eval" else data.split

    def parse(record: Record) -> tuple[str, Collection[str]]:
        read_prompt(record, data.chat)
        return record.name, record.columns(without="prompt")

    records, skipped = load_records(getattr(data, key), split, parse, data.on_bad_record, names=data.names)
    _tell_columns(config, records, tell)
    tell(f"data.{key}: {len(records)} prompts{_left_out(skipped)}; `r2m train` checks their lengths")


def _tell_columns(
    config: R2MConfig, records: Sequence[tuple[str, Collection[str]]], tell: Callable[[str], None]
) -> None:
    """Does what `check_columns` does, and tells what is to be told of columns."""
    check_columns(config, records)
    for note in columns_to_tell(config, records):
        tell(note)


def _left_out(skipped: dict[str, int]) -> str:
    """How many records were left out, by reason, for a line that is printed."""
    return "".join(f", {count} left out: {reason}" for reason, count in skipped.items())
