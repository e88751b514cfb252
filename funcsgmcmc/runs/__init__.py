"""Runs of many chains: `sample`, a run in progress, its data, its record and the store of that."""
