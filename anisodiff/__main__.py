"""`python -m anisodiff`: as the workflow's rules call it, from the repository's root, installed or not."""

from anisodiff.cli import main

main()
