"""How the pages look, and what the keyboard does: Gradio's theme with the system's fonts, some CSS, one script."""

import base64
from typing import Any

import PIL.Image

from d_emo.pipelines.demo.results import png

# Of the way from noise, pictures of at most so many pixels are shown.
WAY_SIDE = 128
SYSTEM_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container main { width: 100% !important; max-width: 1100px; margin: auto; }
.gradio-container .column { min-width: min(280px, 100%) !important; }
.gradio-container h1, .gradio-container .prose p, .status { overflow-wrap: anywhere; }
.bar { align-items: flex-end; }
.small-pictures img { image-rendering: pixelated; }
#grid .grid-wrap { min-height: 0 !important; max-height: none !important; }
#grid { --narrowest: min(180px, 45%); }
#grid.small-pictures { --narrowest: min(120px, 22%); }
#grid .grid-container { grid-template-columns: repeat(auto-fit, minmax(var(--narrowest), 1fr)) !important; }
#grid .gallery-item { max-width: 320px; }
#grid.small-pictures .gallery-item { max-width: 160px; }
#grid .thumbnail-item { aspect-ratio: auto; }
.way { display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; }
@media (max-width: 640px) { .way { grid-template-columns: repeat(4, 1fr); } }
.way figure { margin: 0; text-align: center; font-size: var(--text-sm); }
.way img { width: 100%; margin: 0; }
#code .cm-gutters { display: none; }
.status .wrong { color: #b91c1c; font-weight: 600; }
.dark .status .wrong { color: #fca5a5; }
button:focus-visible, a:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
"""

# Enter in a field draws, but in a list of choices that is open, where it chooses. A list's field is selected when it is
# entered, so that what is typed is searched for.
HEAD = """
<script>
const isList = (field) => field.getAttribute("role") === "listbox" || field.hasAttribute("aria-expanded");
document.addEventListener("keydown", (event) => {
  const field = event.target;
  if (event.key !== "Enter" || event.isComposing || field.tagName !== "INPUT" || !field.closest(".wish")) return;
  if (field.getAttribute("aria-expanded") === "true") return;
  setTimeout(() => document.querySelector("#draw").click(), 100);
}, true);
document.addEventListener("click", (event) => {
  if (event.target.tagName === "INPUT" && isList(event.target)) event.target.select();
});
</script>
"""


def theme() -> Any:
    """Gradio's own theme with fonts that every system has."""
    import gradio as gr

    plain = gr.themes.Default(font=SYSTEM_FONT, font_mono=SYSTEM_MONO)
    return plain.set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")


def way_shown(way: list[tuple[int, PIL.Image.Image]]) -> str:
    """The way of one image from noise as HTML, each picture over its number of steps."""
    figures: list[str] = []
    for step, image in way:
        small = image.copy()
        small.thumbnail((WAY_SIDE, WAY_SIDE))
        source = base64.b64encode(png(small)).decode()
        figures.append(
            f'<figure><img src="data:image/png;base64,{source}" alt="after step {step}"><figcaption>'
            f"{'step ' if len(figures) == 0 else ''}{step}</figcaption></figure>"
        )
    return f'<div class="way">{"".join(figures)}</div>'
