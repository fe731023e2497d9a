"""Grids by name: one function that makes `Levels` from a `GridRequest`, and one line here, make a new one."""

from dataclasses import dataclass

from anisodiff.registry import Entry


@dataclass(frozen=True)
class Grid(Entry):
    """A grid: where a path is evaluated.

    Attributes:
        source: the function `(GridRequest) -> Levels` (`grids/levels.py`).
        ends_at_min: its last node is sigma_min, so that a step to 0 follows as a rule.
        in_path_time: its nodes are times of the path, so that a step to 0 follows where the budget asks for it.
        takes: settings of a method that are for this grid.
    """

    ends_at_min: bool = False
    in_path_time: bool = False
    takes: tuple[str, ...] = ()

    @property
    def from_file(self) -> bool:
        """Whether its nodes come from a file that a stage made."""
        return bool({"warp", "search", "tuning"} & set(self.takes))


GRIDS = {
    "karras": Grid("grids.fixed:karras_grid", ends_at_min=True, takes=("rho",)),
    "log-snr": Grid("grids.fixed:log_snr_grid", ends_at_min=True),
    "vp-time": Grid("grids.fixed:vp_time_grid", ends_at_min=True, takes=("rho",)),
    "path-time": Grid("grids.fixed:path_time_grid", in_path_time=True, takes=("last_level",)),
    "mean-karras": Grid("grids.fixed:mean_karras_grid", ends_at_min=True, takes=("rho",)),
    "warped": Grid("grids.fixed:path_time_grid", in_path_time=True, takes=("last_level", "warp")),
    "searched": Grid("grids.gits:searched_grid", takes=("search",)),
    "tuned": Grid("grids.learned:tuned_grid", takes=("tuning",)),
    "given": Grid("grids.fixed:given_grid", takes=("levels",)),
}
