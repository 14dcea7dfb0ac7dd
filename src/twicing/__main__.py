"""`python -m twicing` is the command `twicing`, also for torchrun -m."""

from twicing.cli import main

main()
