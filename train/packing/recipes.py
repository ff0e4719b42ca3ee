"""Which models come with the package, and what their cards say that no run knows."""

from dataclasses import dataclass

# Of scikit-learn's digits.
DIGITS_LICENCE = (
    "The weights are under Apache-2.0, like the package. They were trained on scikit-learn's digits, which are the "
    "test set of *Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998) of the [UCI Machine "
    "Learning Repository](https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits). "
    "UCI offers its data sets under CC BY 4.0; scikit-learn, which ships this one, is under the 3-clause BSD licence."
)


BUSY = "The time is that of a machine which worked for others as well, and the run stood still for part of it."


@dataclass(frozen=True)
class Recipe:
    """How a packaged model is made.

    Attributes:
        config: file of `train/configs`.
        kind: what it does: "draws" (the diffusion trainer's) or "classifies" (the classification trainer's).
        good_for: what one may expect of it, and what not.
        licence: of the weights, with the data's source and terms.
        remark: on the training that made what is in the package.
    """

    config: str
    kind: str
    good_for: str
    licence: str
    remark: str = ""


RECIPES = {
    "digits": Recipe(
        config="digits-packaged.yaml",
        kind="draws",
        good_for=(
            "Good for: a first picture without a network, tests, tutorials, trying samplers and guidance in seconds "
            "on a CPU. It knows 1,797 scans of 8 x 8 pixels by 13 people, enlarged to 16 x 16, and nothing else. It "
            "says nothing on how D-EMOv2 does on photographs."
        ),
        licence=DIGITS_LICENCE,
        remark=BUSY,
    ),
    "digits-classifier": Recipe(
        config="classifier/digits-packaged.yaml",
        kind="classifies",
        good_for=(
            "Good for: tests, tutorials, reading digits like those it was trained on, drawn ones among them (the model "
            "`digits`). It saw four fifths of 1,797 scans of 8 x 8 pixels, enlarged to 32 x 32; it reads no digits of "
            "other styles, in colour, or in photographs."
        ),
        licence=DIGITS_LICENCE,
        remark=BUSY,
    ),
}
