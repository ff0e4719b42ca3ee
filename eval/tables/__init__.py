"""Tables that the documents show, printed by a command each."""
