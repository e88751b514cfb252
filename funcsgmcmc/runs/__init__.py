"""How chains are run: `sample`, a run in progress, its data, its record and where that is kept."""
