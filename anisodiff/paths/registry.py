"""Paths that need no training, by name."""

from anisodiff.registry import Entry

PATHS = {  # the function takes a `ScheduleRequest` and returns a schedule
    "karras": Entry("paths.schedules:karras_schedule"),
    "spectral": Entry("paths.schedules:spectral_schedule"),
    "exponent": Entry("paths.schedules:exponent_schedule"),
}
