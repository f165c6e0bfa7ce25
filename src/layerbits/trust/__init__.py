"""How sure a ranking is: intervals, rank stability, validation against measured damage, repeated runs."""
