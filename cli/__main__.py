"""`python -m quantlab.cli` is `quantlab`."""

from quantlab.cli import main

main()
