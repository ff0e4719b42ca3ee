"""docs/video.md: its lines run, and its table is what they print."""

import re

from helpers.paths import ROOT
from helpers.videos import write_video

from d_emo import EMOv2Config, EMOv2ForImageClassification

TEXT = (ROOT / "docs" / "video.md").read_text(encoding="utf-8")


def test_the_lines_of_the_document_run_and_print_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", 12, 64, 48)
    EMOv2ForImageClassification(EMOv2Config.of("EMOv2-5M", num_labels=7)).save_pretrained("my-image-classifier")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), "docs/video.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "'score': 0.1428" in printed and "torch.Size([1, 7])" in printed
    rows = [line.rstrip(" |") for line in printed.splitlines() if line.startswith("| V-EMOv2")]
    assert len(rows) == 4 and all(row in TEXT for row in rows)
