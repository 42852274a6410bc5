"""How well an exported folder captions and answers: a local set of questions, scored, with a page of the worst."""
