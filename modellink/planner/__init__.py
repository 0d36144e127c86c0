"""What a run will put on each rank: layers, parameters and bytes. Needs no torch and no device."""
