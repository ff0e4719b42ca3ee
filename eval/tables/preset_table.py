"""The presets of `evaluate_fid` side by side, and where each is published.

python eval/tables/preset_table.py        # the tables of docs/fid.md
"""

import sys

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.eval.fid.protocol import EVERYWHERE, PRESETS, PUBLICATIONS, SamplingSettings, show_setting
from d_emo.pipelines.samplers import FLOW_SAMPLERS

SETTINGS = (
    "preset",
    "images",
    "sampler",
    "steps",
    "shift",
    "labels",
    "guidance",
    "of the way",
    "decoder",
    "sizes",
    "reference",
    "what else",
)
SOURCES = ("preset", "setting", "from")


def settings_row(name: str) -> tuple[str, ...]:
    """What a preset draws with."""
    settings, publication = PRESETS[name], PUBLICATIONS[name]
    guided = settings.guidance_scale > 1
    channels = f" on {settings.guidance_channels} channels" if settings.guidance_channels else ""
    part = "all" if settings.guidance_interval == EVERYWHERE else show_setting(settings.guidance_interval)
    unguided = ["published without guidance, too"] if publication.unguided else []
    return (
        f"`{name}`",
        f"{settings.num_images:,}",
        settings.sampler,
        str(settings.steps),
        shift_of_preset(settings),
        settings.labels,
        f"{settings.guidance_scale:g}{channels}" if guided else "none",
        part if guided else "",
        settings.vae.rsplit("/", 1)[-1] if settings.vae else "the pipeline's",
        ", ".join(map(str, publication.sides)) or "any",
        publication.reference("SIDE") if publication.sides else "any",
        "; ".join([*([publication.note] if publication.note else []), *unguided]),
    )


def shift_of_preset(settings: SamplingSettings) -> str:
    """Its shift of a flow's times."""
    if settings.sampler not in (*FLOW_SAMPLERS, "fast"):
        return ""
    return "the model's" if settings.time_shift is None else show_setting(settings.time_shift)


def source_rows(name: str) -> list[tuple[str, ...]]:
    """Where each of a preset's settings comes from."""
    return [(f"`{name}`", setting, source) for setting, source in PUBLICATIONS[name].sources]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |").replace("|  |", "| |")


@command("preset_table")
def main(arguments: list[str]) -> None:
    """Print both tables."""
    CommandParser("preset_table", __doc__).parse_args(arguments)
    print(table(SETTINGS, [settings_row(name) for name in PRESETS]))
    print()
    print(table(SOURCES, [row for name in PRESETS for row in source_rows(name)]))


if __name__ == "__main__":
    main(sys.argv[1:])
