"""What a GPU that is lent for some minutes is used for: README.md says how, and `first_run`, `train`, `pair` and
`quality` are the commands.
"""
