"""`python -m d_emo` is `d-emo`."""

from d_emo.cli.main import main

if __name__ == "__main__":  # processes that a command starts import this module, too
    main()
