"""A world in color: emoji in two styles, a tiny SD1.5 base that knows one, pairs, a scorer."""
