"""How well a classifier holds where images differ from those that it was trained on: other sets, corruptions, hidden patches."""
