"""Everything that can be checked before a rank starts. Needs no torch until a file of the run demands it."""
