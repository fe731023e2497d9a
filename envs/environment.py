"""Print the conda environment of the pip lock: `python envs/environment.py < envs/requirements.txt`."""

import sys

HEAD = """\
# Made from envs/requirements.txt by `make lock`; do not edit.
name: anisodiff
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def environment(lock: str) -> str:
    """The text of the environment file: Python from conda-forge, everything else the pins of the lock."""
    pins = [line.split(" #")[0].strip() for line in lock.splitlines() if line and not line.lstrip().startswith("#")]
    return HEAD + "".join(f'      - "{pin}"\n' for pin in pins)


if __name__ == "__main__":
    print(environment(sys.stdin.read()), end="")
