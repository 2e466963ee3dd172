"""The keys of the section `data` that the configs of runs and of reward models share: how records are read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from r2m_async.config_tree import Keys, Section


class Filters(Keys):
    """Limits on the lengths of records. A longer record is left out and counted, whatever `data.on_bad_record` says."""

    max_prompt_tokens: int | None = Field(None, gt=0)
    """The most tokens of a prompt, with its chat template. None: no limit."""
    max_chosen_tokens: int | None = Field(None, gt=0)
    """The most tokens of the chosen response, by itself. R2M takes prompts whose chosen response has 512 at most."""
    max_rejected_tokens: int | None = Field(None, gt=0)
    """The most tokens of the rejected response, by itself."""

    def limits(self) -> dict[str, int]:
        """The limits that are set, by `prompt`, `chosen` and `rejected`."""
        found = {key.split("_")[1]: limit for key, limit in self if limit is not None}
        return found


class RecordsSection(Section):
    """How the records of a data source are read."""

    on_bad_record: Literal["error", "skip"] = "error"
    """What happens to a record that cannot be used. `error`: the run does not start, and the message names file and
    line. `skip`: the record is left out and counted."""
    prompt_field: str = "prompt"
    """Name of the field of a record that holds the prompt. A prompt is a text, or a list of turns with role and
    content. It is the short form of `columns: {prompt: NAME}`; the two must not disagree."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For each field, the name that it has in the data: with `{chosen: better}` the field `better` is read as `chosen`.
    The fields prompt, chosen, rejected, chosen_score, rejected_score, chosen_finished, rejected_finished and
    reference_summary are read. A field of any other name is given to the reward functions that ask for it. If the data
    also have a field `chosen`, `better` hides it."""
    chat: bool = False
    """Whether a prompt that is a text is a turn of the user, which goes through the chat template. If not, the model
    reads the text as it is."""
    filters: Filters = Filters()
    """Limits on the lengths of records, in tokens of the model that is trained."""
    split: str = "train"
    """The split that is read of a data set, at Hugging Face or in a folder. Single files have none."""
    eval_split: str | None = None
    """The split that is read of `eval`. None is that of `split`."""

    @property
    def names(self) -> dict[str, str]:
        """For each field, the name that it has in the data."""
        return {"prompt": self.prompt_field, **self.columns}


def one_name_for_the_prompt(data: RecordsSection) -> str | None:
    """Returns a message if `prompt_field` and `columns` name two fields for the prompt, else None."""
    named = data.columns.get("prompt", data.prompt_field)
    if data.prompt_field in ("prompt", named):
        return None
    return (
        f"data.prompt_field is {data.prompt_field!r} and data.columns.prompt is {named!r}: both name the field of the prompt; "
        f"leave one out"
    )
