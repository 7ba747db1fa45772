"""The embedded world: facts about territories in seven languages, and the benchmark about them."""
