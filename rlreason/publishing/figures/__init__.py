"""How it is shown: every figure of the book, in one style.

A function here takes what was measured and returns a ``Figure``; it runs nothing and
reads no file. Chapters show the figure, with its number, caption and description, by
way of ``rlreason.publishing.chapter.show``.

Figures stand on an opaque white ground, so that every viewer of notebooks can show
them; the pages of the book turn them to dark where they are dark. Colours are from the
sets of Okabe and Ito (2008) and of Tol (2021), picked so that each has a contrast of
3:1 on white and no two look alike to a reader who lacks one kind of cone; and no figure
tells things apart by colour alone.

==========  ============================================================
module      what is in it
==========  ============================================================
``style``   colours, the empty figure, and pieces of several figures
``tokens``  texts, token by token, and the batches that they fill
``ideas``   what a method does, on a toy or without numbers
``results`` what was measured: accuracies, losses, runs
==========  ============================================================
"""

# ruff: noqa: F401 - these are the names to import from here
from rlreason.publishing.figures.ideas import (
    draw_clip,
    draw_coverage,
    draw_expert_iteration,
    draw_inverse_cdf,
    draw_loop,
    plot_bias_variance,
    plot_calibration,
    plot_draws,
    plot_gradient,
    plot_task,
)
from rlreason.publishing.figures.results import (
    plot_accuracies,
    plot_bars,
    plot_coverage,
    plot_intervals,
    plot_panels,
    plot_pass_curves,
    plot_phases,
    plot_rollouts,
    plot_rounds,
    plot_seeds,
    plot_steps,
    plot_training,
)
from rlreason.publishing.figures.style import (
    COLORS,
    INK,
    MUTED,
    PALETTE,
    RIGHT,
    STYLE,
    WRONG,
    color_of,
    token_labels,
    use_style,
)
from rlreason.publishing.figures.tokens import (
    draw_batches,
    draw_episode,
    draw_layout,
    draw_payments,
    draw_rows,
    draw_scores,
    draw_tokens,
    plot_update,
)
