"""``python -m cakeflow``, which is the command ``cakeflow``."""

from cakeflow.cli.command_line import main

if __name__ == "__main__":
    main()
