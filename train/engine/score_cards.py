"""What the model cards of all tasks say of validation: a table of the last scores, and the Hub's fields."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.validation_log import read_validation

# So many of the last validations are shown.
SHOWN_ROWS = 5


class Score(NamedTuple):
    """A column of the table.

    Attributes:
        name: in `validation.csv`.
        title: for people.
        metric: type and name of the Hub's; None for what is not told there.
        form: how its values are written.
    """

    name: str
    title: str
    metric: tuple[str, str] | None
    form: str = ".2%"


ACCURACY = (
    Score("top1", "top-1", ("accuracy", "top-1 accuracy")),
    Score("top5", "top-5", ("accuracy", "top-5 accuracy")),
    Score("loss", "loss", None, ".4f"),
)


def validation_lines(
    plan: Any, circumstances: Circumstances, scores: Sequence[Score], how: str = "", thing: str = "image"
) -> list[str]:
    """How the averaged weights did, in lines.

    Args:
        plan: of the run.
        circumstances: how it went up to the card.
        scores: the columns.
        how: they were measured, behind what on.
        thing: that is validated on.
    """
    if plan.validation is None:
        return [f"No {thing} to validate on was named, so nothing was scored."]
    rows = _rows(plan, circumstances)
    if not rows:
        return [f"Nothing was scored up to step {circumstances.step:,}."]
    return [
        f"Averaged weights on {plan.validation.name}, {plan.validation.describe_size()}{how}:",
        "",
        f"| step | {' | '.join(score.title for score in scores)} |",
        f"|{'---|' * (1 + len(scores))}",
        *(
            f"| {row['step']:,.0f} | {' | '.join(_shown(row[score.name], score.form) for score in scores)} |"
            for row in rows[-SHOWN_ROWS:]
        ),
    ]


def model_index(plan: Any, circumstances: Circumstances, task: str, scores: Sequence[Score]) -> dict[str, Any]:
    """The last scores, as the Hub's evaluation table reads them: a field of the card's head, or none."""
    rows = _rows(plan, circumstances)
    if not rows:
        return {}
    data, last = plan.validation.name, rows[-1]
    metrics = [
        {"type": score.metric[0], "name": score.metric[1], "value": round(last[score.name], 4)}
        for score in scores
        if score.metric and last[score.name] == last[score.name]  # not where there was nothing to find
    ]
    dataset = {"name": data, "type": data.split(",")[0]}
    result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
    return {"model-index": [{"name": circumstances.name, "results": [result]}]}


def _rows(plan: Any, circumstances: Circumstances) -> list[dict[str, float]]:
    if plan.validation is None:
        return []
    return [row for row in read_validation(plan.output_dir) if row["step"] <= circumstances.step]


def _shown(value: float, form: str) -> str:
    return format(value, form) if value == value else "-"
