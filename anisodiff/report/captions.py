"""Titles and captions of the figures, by file name and in the order of a page: on the figures and in the report."""

from typing import NamedTuple


class Caption(NamedTuple):
    """What a figure shows, of which `{dataset}`, and how to read it."""

    title: str
    text: str


HEADLINE = "distance-against-nfe"  # of a report, where there is no ladder
LADDER = "ladder"
SHAPES = (
    "Lines are medians over trajectories, bands hold the middle 80 %. One panel or row for each network over a path; "
    "sampling goes from left to right, from noise to image. Colour and line are the denoiser here."
)
FIGURES = {
    LADDER: Caption(
        "{dataset}: what each ingredient buys",
        "A line is a method, one ingredient more than the one before: its mean, with bars of one standard error over "
        "images, and over training seeds where there are several. Colour is the path, line and marker the solver, in "
        "all figures.",
    ),
    HEADLINE: Caption(
        "{dataset}: Frechet distance against NFE",
        "A line is a method: its mean, with bars of one standard error over images, and over training seeds where "
        "there are several; the grey band is the best of all. Colour is the path, line and marker the solver. Values "
        "that others published are grey, in panels of their own. NFE counts the denoiser's evaluations for one image. "
        "Lower is better.",
    ),
    "bits-against-distance": Caption(
        "{dataset}: likelihood against Frechet distance",
        "A point is a method, at the largest budget that most have, with the bits per dimension of held-out images "
        "under its network over its path: upright bars are standard errors over the images, level ones over images, "
        "and over training seeds where there are several. Left the density along the probability flow, right the "
        "bound, where both were measured. Colour is the path, marker the solver; values that others published are "
        "grey. Lower is better on both axes.",
    ),
    "against-kimg": Caption(
        "{dataset}: what training a path longer does",
        "Distance at each budget against the images that the path has seen since the base network, with bars of one "
        "standard error over images, and over training seeds where there are several; right the loss that training "
        "lowers, on held-out images, of the first seed. Dotted is a path that is not trained. Colour, line and marker "
        "are the budget here.",
    ),
    "samples": Caption(
        "{dataset}: images of the same seeds under every method",
        "Beside images of the data. The same place in every panel has the same noise.",
    ),
    "denoising-strips": Caption(
        "{dataset}: denoised estimates on the way from noise to image",
        "A row is one image: what the denoiser expects at each node of the grid. Beside it the noise level of each "
        "subspace; colour is the path, as in all figures.",
    ),
    "learned-levels": Caption(
        "{dataset}: noise levels of the subspaces over time",
        "Standard deviation of the noise, from the image (t = 0) to pure noise (t = T). Of more than four subspaces, "
        "four are drawn, from the first to the last. A band is the range over classes. Paths that differ by 1 % at "
        "most are one line. Of several panels, each has the first path in grey. Colour is the path, as in all figures; "
        "here line and marker are not the solver but subspace and path, open markers warped.",
    ),
    "log-ratio": Caption(
        "{dataset}: ratio of the variances of the subspaces over time",
        "Below zero subspace 1 (the lowest frequencies, or the leading principal directions) is less noisy than the "
        "others. Of several trainings the first; a line is the geometric mean over classes, a band their range. Of "
        "more than four subspaces, four are drawn, from the first to the last. Paths that differ by 1 % at most are "
        "one line. Colour is the path, as in all figures; open markers are warped.",
    ),
    "convergence": Caption(
        "{dataset}: Frechet distance at every node of a grid",
        "Of the states, and of the denoised estimates: what a jump from that node to the end would return. "
        "Colour is the path, line and marker the solver, as in all figures.",
    ),
    "geometry-deviation": Caption(
        "{dataset}: how far trajectories leave the straight line between their ends",
        "Left the distance from that chord; in the middle the residual, without the curve that the path alone would "
        "make between the same ends, were all data one point, which is straight where all subspaces fall together; "
        f"right the distance to the trajectory's last point. {SHAPES}",
    ),
    "geometry-projections": Caption(
        "{dataset}: how few directions hold a trajectory",
        "Left the error of a trajectory projected on its chord and a few directions more, right the share of the "
        "squared deviation that these explain (mean and standard deviation over trajectories).",
    ),
    "geometry-shapes": Caption(
        "{dataset}: trajectories in three dimensions",
        "The chord and the first two directions; trajectories are turned about their chords onto one another.",
    ),
    "geometry-bending": Caption(
        "{dataset}: where trajectories bend",
        "Curvature, turning for each e-fold of noise, and torsion where the curve turns fast enough to have one. "
        f"{SHAPES}",
    ),
    "geometry-noise": Caption(
        "{dataset}: size of the predicted noise along trajectories", f"That of noise itself is 1. {SHAPES}"
    ),
    "geometry-optimum": Caption(
        "{dataset}: how the optimal denoiser settles on one image",
        "Entropy of its weights on the training images (dotted: what a unit of log noise takes of it), the weights of "
        "eight images along one trajectory, and the distance of the network's estimates from the optimum's. "
        f"{SHAPES}",
    ),
    "geometry-pictures": Caption(
        "{dataset}: a trajectory of the network and one of the optimum, from the same noise",
        "States and denoised estimates at a few noise levels, and the training images nearest to where each ends.",
    ),
    "geometry-gaussian": Caption(
        "{dataset}: which directions leave the chord, for Gaussian data",
        "Left and middle, by principal direction and noise level, what a direction adds to the squared deviation of "
        "any trajectory and of one; right, the deviation, and the distance from the chord's point with as much noise.",
    ),
    "toy-forward": Caption(
        "{dataset}: forward trajectories from the data to noise",
        "Seen along the y axis, in the process's own coordinates, to half its time; the same noise in all panels.",
    ),
    "toy-velocities": Caption(
        "{dataset}: velocities of the flow towards the data, at $t = 0.3$ and $y = 0$",
        "What the network has learned, over the exact flow of the same process; all arrows to one scale.",
    ),
    "toy-trajectories": Caption(
        "{dataset}: four sampling trajectories of the same seeds",
        "Seen along the y axis, in the process's own coordinates.",
    ),
    "toy-damped": Caption(
        "Noise on the velocities alone: mean and covariance on their way to N(0, I)",
        "Langevin dynamics of a position that starts at 2, at rest, by its friction; in closed form.",
    ),
    "learned-bases": Caption(
        "{dataset}: vectors of learned bases, and what they started as",
        "Those that turned most, of each learned basis, with their angles from the start. Grey is 0, and each is drawn "
        "to its own largest entry; of colour images, one that is of some channels alone is coloured.",
    ),
    "dct-bases": Caption(
        "The first nine modes of a 32 x 32 cosine transform",
        "By increasing frequency, (row, column): the directions of which a subspace holds some.",
    ),
}
