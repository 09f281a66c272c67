"""What chapters speak with: sentences, figures, tables, differences in points."""

from __future__ import annotations

import re
from datetime import date

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from rlreason.evaluation.evaluate import ProblemResult, Report
from rlreason.evaluation.intervals import Interval, verdict
from rlreason.publishing import chapter, figures

GAIN = Interval(0.047, 0.007, 0.087, 300, "paired")


@pytest.fixture
def outputs():
    """Run something as a notebook's cell does; gives what it displayed."""
    InteractiveShell.instance()

    def shown(run):
        with capture_output() as captured:
            run()
        return captured.outputs

    yield shown
    InteractiveShell.clear_instance()


def test_sentences_are_markdown(outputs):
    (output,) = outputs(lambda: chapter.say("\nIt is *4*.\n"))
    assert output.data["text/markdown"] == "It is *4*."


def test_a_number_at_the_start_of_a_line_begins_no_list(outputs):
    (output,) = outputs(lambda: chapter.say("The best is\n1. The rest\nfollow."))
    assert output.data["text/markdown"] == "The best is 1. The rest\nfollow."
    steps = "Two steps:\n\n1. sample\n2. filter"
    (output,) = outputs(lambda: chapter.say(steps))
    assert output.data["text/markdown"] == steps


def test_a_figure_has_its_number_its_caption_and_a_description(outputs):
    picture, caption = outputs(
        lambda: chapter.show(
            figures.draw_loop(), "Figure 1.2. A loop. It turns.", alt="A loop."
        )
    )
    assert picture.data["image/png"]
    shape = picture.metadata["image/png"]
    assert shape == {"alt": "A loop.", "width": 700, "height": 250}
    assert caption.data["text/markdown"] == "**Figure 1.2.** A loop. It turns."


@pytest.mark.parametrize(
    ("caption", "alt"), [("A loop.", "A loop."), ("Figure 1.2. A loop.", " ")]
)
def test_a_figure_without_a_number_or_a_description_is_refused(caption, alt):
    with pytest.raises(ValueError, match=r"Figure 5\.2"):
        chapter.show(figures.draw_loop(), caption, alt=alt)


def test_a_caption_says_where_the_numbers_come_from():
    on = date(2025, 1, 31)
    assert chapter.provenance("tiny", 0, on) == "Profile tiny, seed 0; 31 January 2025."
    told = chapter.provenance("/profiles/mine.yaml", [0, 1], on)
    assert told == "Profile mine, seeds 0, 1; 31 January 2025."


def test_a_difference_is_told_in_points_with_both_ends():
    assert chapter.points(GAIN) == "+4.7 points (+0.7 to +8.7)"


def test_a_difference_is_inconclusive_where_its_interval_holds_zero():
    assert verdict(GAIN) == "a gain"
    assert verdict(Interval(-0.1, -0.2, -0.01, 3, ""), less="worse") == "worse"
    assert verdict(Interval(0.1, 0.0, 0.2, 3, "")) == "inconclusive"


def test_a_table_has_a_line_a_row_numbers_at_the_right_and_gaps_left_empty():
    rows = [{"name": "a", "new_share": 0.25}, {"name": "b"}]
    assert chapter.table(rows, {"name": "", "new_share": ".1%"}).data == (
        "| name | new share |\n| --- | --: |\n| a | 25.0% |\n| b |  |"
    )


def report(*right: bool) -> Report:
    results = tuple(ProblemResult(str(i), "1", ok, True) for i, ok in enumerate(right))
    return Report("nano", 0, 0.7, 64, 0, results)


def test_policies_are_set_against_the_first_by_problem(outputs):
    found = {}
    before, after = report(True, False, False, False), report(True, True, True, False)
    (output,) = outputs(
        lambda: found.update(chapter.before_after({"SFT": before, "EI": after}))
    )
    assert list(found) == ["EI"]
    assert np.isclose(found["EI"].mean, 0.5)
    head, _, first, second = output.data["text/markdown"].splitlines()
    assert head == "| policy | maj@1 | against SFT | verdict |"
    assert re.fullmatch(r"\| SFT \| 0\.250 \[.*\] \|  \|  \|", first)
    assert "+50.0 points" in second
