"""`python -m vmpo`, the same as `vmpo`; what torchrun is given."""

from vmpo.cli import main

main()
