"""`python -m launch`: the same as the `launch` command."""

from launch.cli import main

main()
